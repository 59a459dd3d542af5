"""The derivative engines against one backward pass per sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.core.tiny import Setup
from trace_ray.core.derivatives import (
    Params,
    fd_derivatives,
    ghost_derivatives,
    jvp_derivatives,
    per_sample_derivatives,
    scale_of,
)


def along(setup: Setup, direction: Params, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Each sequence a row of its own, at theta + its step * direction."""

    def values_at(steps: Tensor) -> Tensor:
        moved = [{k: p + t * direction[k] for k, p in setup.params.items()} for t in steps]
        return torch.cat([setup.logps(at, row[None]) for at, row in zip(moved, rows, strict=True)])

    return values_at


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def run(name: str, setup: Setup, direction: Params, rows: Tensor | None = None, **more) -> Tensor:
    rows = torch.arange(8) if rows is None else rows
    values_at = along(setup, direction, rows)
    steps = torch.zeros(len(rows), dtype=next(iter(setup.params.values())).dtype)
    if name == "fd":
        return fd_derivatives(values_at, steps, scale_of(direction), **more)
    return {"jvp": jvp_derivatives, "ghost": ghost_derivatives}[name](values_at, steps)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["jvp", "ghost"])
def test_the_exact_engines_are_per_sample_backward(name: str, fresh: bool) -> None:
    setup = Setup(torch.float64, fresh)
    direction = setup.direction()
    exact = per_sample_derivatives(setup.logps, setup.params, direction)
    got = run(name, setup, direction)
    assert got.shape == (8,)
    assert not got.requires_grad
    assert exact.abs().min() > 0
    assert relative_error(got, exact) <= 1e-12


@pytest.mark.parametrize("fresh", [True, False])
def test_finite_differences_are_close_in_float32(fresh: bool) -> None:
    setup = Setup(torch.float32, fresh)
    direction = setup.direction()
    exact = run("jvp", setup, direction)
    assert relative_error(run("fd", setup, direction), exact) <= 1e-3
    larger = {name: 100 * g for name, g in direction.items()}  # the step is eps, whatever |g|
    assert relative_error(run("fd", setup, larger) / 100, exact) <= 1e-3


def test_finite_differences_are_of_second_order() -> None:
    """In float64, where rounding is nothing: half the step, a quarter of the error."""
    setup = Setup(torch.float64, fresh=False)
    direction = setup.direction()
    exact = run("jvp", setup, direction)
    errors = [relative_error(run("fd", setup, direction, eps=eps), exact) for eps in (0.002, 0.001)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("name", ["jvp", "ghost", "fd"])
def test_engines_leave_the_parameters_alone(name: str) -> None:
    setup = Setup(torch.float32, fresh=True)
    direction = setup.direction()
    before = {key: p.detach().clone() for key, p in setup.params.items()}
    zero = {key: torch.zeros_like(g) for key, g in direction.items()}
    assert torch.equal(run(name, setup, zero), torch.zeros(8))
    run(name, setup, direction)
    for key, p in setup.params.items():
        assert torch.equal(p, before[key])
        assert p.grad is None


def test_bad_input_is_refused() -> None:
    setup = Setup(torch.float32, fresh=True)
    direction = setup.direction()
    with pytest.raises(ValueError, match="1 names"):
        per_sample_derivatives(setup.logps, setup.params, direction | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match="need float32"):
        fd_derivatives(lambda steps: steps, torch.zeros(2, dtype=torch.bfloat16), 1.0)


def test_values_that_no_step_moves_have_no_derivative() -> None:
    assert ghost_derivatives(lambda steps: torch.ones(3), torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["jvp", "ghost", "fd"])
def test_derivatives_do_not_depend_on_batch_size_or_order(name: str) -> None:
    setup = Setup(torch.float64, fresh=False)
    direction = setup.direction()
    whole = run(name, setup, direction)
    order = torch.randperm(8)
    parts = torch.cat([run(name, setup, direction, part) for part in order.split(3)])
    torch.testing.assert_close(parts, whole[order], rtol=1e-9, atol=1e-9)
