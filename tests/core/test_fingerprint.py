"""What an engine must show of an adapter before it counts as applied."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.fingerprint import NOISE_NATS, Probe, not_in_effect

LOGP = st.floats(-12, 0)
ROWS = st.integers(1, 8).flatmap(
    lambda n: st.lists(st.tuples(LOGP, LOGP), min_size=n, max_size=n).map(
        lambda rows: [*zip(*rows, strict=True)]
    )
)


def probes_of(rows: list[list[tuple[float, ...]]]) -> list[Probe]:
    return [
        Probe((1, 2), tuple(range(len(base))), tuple(base), tuple(adapter))
        for base, adapter in rows
    ]


def is_visible(probes: list[Probe]) -> bool:
    shifts = [a - b for p in probes for a, b in zip(p.adapter, p.base, strict=True)]
    return sum(s * s for s in shifts) / len(shifts) > 1.01 * NOISE_NATS**2


@given(st.lists(ROWS, min_size=1, max_size=4), st.floats(-0.02, 0.02), st.floats(-3, 3))
def test_an_engine_that_rounds_otherwise_passes(rows, error, offset) -> None:
    probes = probes_of(rows)
    base = [[value + offset for value in probe.base] for probe in probes]
    seen = [[value + offset + error for value in probe.adapter] for probe in probes]
    assert not_in_effect(probes, base, seen) is None


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_an_adapter_that_is_not_applied_or_is_another_is_found(rows) -> None:
    probes = probes_of(rows)
    base = [list(probe.base) for probe in probes]
    turned = [[2 * b - a for a, b in zip(p.adapter, p.base, strict=True)] for p in probes]
    if is_visible(probes):
        assert "not applied" in str(not_in_effect(probes, base, base))
        assert "otherwise" in str(not_in_effect(probes, base, turned))


def test_a_change_too_small_to_see_proves_nothing_and_values_must_match() -> None:
    probe = Probe((1,), (4, 5), (-1.0, -2.0), (-1.01, -1.99))
    assert not_in_effect([probe], [[-1.0, -2.0]], [[-1.0, -2.0]]) is None
    assert "otherwise" in str(not_in_effect([probe], [[-1.0, -2.0]], [[-3.0, -2.0]]))
    assert "otherwise" in str(not_in_effect([probe], [[-1.0, -2.0]], [[math.nan, -2.0]]))
    with pytest.raises(ValueError, match="2 values are recorded, the engine gave 1"):
        not_in_effect([probe], [[-1.0]], [[-1.0]])
    with pytest.raises(ValueError, match="one base and one adapter value"):
        Probe((1,), (4, 5), (-1.0,), (-1.0, -2.0))
    assert Probe.from_row(probe.to_row()) == probe
