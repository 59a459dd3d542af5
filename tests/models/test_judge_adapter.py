"""The fit of a judge adapter."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from trace_ray.config import JudgeFitConfig
from trace_ray.core.policy import Policy
from trace_ray.models.judge_adapter import Checkpoints, fit_judge_adapter
from trace_ray.runtime.parts import Parts
from trace_ray.testing import tiny_model
from trace_ray.types import LabelledResponse, Message

POLICY = Policy.model_validate(
    {"id": "p", "version": "1", "clauses": [{"id": "no-foo", "text": "Never say foo."}]}
)


@pytest.fixture
def fit(tmp_path):
    """A fit of 12 steps, in 3 passes."""
    labels = [
        LabelledResponse((Message("user", f"{i}?"),), f"{word} {i}", word == "foo")
        for i in range(8)
        for word in ("foo", "fine")
    ]
    return partial(
        fit_judge_adapter,
        str(tiny_model(tmp_path / "base", seed=1)),
        POLICY,
        labels,
        JudgeFitConfig(epochs=3, batch_size=4),
        by_clause=False,
        use_cpu=True,
    )


@pytest.fixture
def kept(tmp_path):
    parts = Parts(str(tmp_path / "parts"))
    return Checkpoints(partial(parts.keep, "fit"), partial(parts.restore, "fit"), every_s=0)


def assert_alike(first, second):
    """To rounding: a busy machine may sum in another order."""
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_a_fit_that_was_broken_off_goes_on_and_gives_the_same_adapter(tmp_path, fit, kept):
    fit(out=tmp_path / "undisturbed", on_step=lambda *_: None)

    def kill(step, _):
        if step == 6:  # in the midst of the second pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(out=tmp_path / "first", on_step=kill, checkpoints=kept)
    steps = []
    fit(out=tmp_path / "second", on_step=lambda *at: steps.append(at), checkpoints=kept)
    assert steps == [(step, 12) for step in range(6, 13)]
    assert_alike(tmp_path / "second", tmp_path / "undisturbed")
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_damaged_checkpoint_is_left_aside_with_a_warning(tmp_path, fit, kept, caplog):
    fit(out=tmp_path / "first", on_step=lambda *_: None, checkpoints=kept)
    kept.restore(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "adapter_model.safetensors").write_bytes(b"half")
    kept.keep(tmp_path / "checkpoint")
    steps = []
    fit(out=tmp_path / "second", on_step=lambda *at: steps.append(at), checkpoints=kept)
    assert steps == [(step, 12) for step in range(1, 13)]
    assert "anew" in caplog.text
    assert_alike(tmp_path / "second", tmp_path / "first")
