"""Steps along a direction inside real LoRA layers, against one backward pass per sequence."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call

from trace_ray.config import LoraConfig
from trace_ray.core import derivatives
from trace_ray.errors import ModelError
from trace_ray.models.likelihood import Likelihood, Line
from trace_ray.models.policy_model import REFERENCE, TRAINED, load_policy_model, trained_parameters
from trace_ray.testing import tiny_adapter, tiny_model

LORA = LoraConfig(r=8, alpha=16, dropout=0.5, targets=["q_proj", "v_proj"])
GROUPS = [
    [([1, 11, 12], [13, 14, 9]), ([1, 11, 12], [13, 15])],
    [([1, 16], [17, 18, 19]), ([1, 16], [20])],
    [([1, 11, 12, 13], [14])],
]
SINGLE = [[exchange] for group in GROUPS for exchange in group]
FIRST, SECOND, THIRD = slice(0, 2), slice(2, 4), slice(4, 5)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def base(request, tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(params=["fresh", "deployed"])
def adapter(request, base, tmp_path):
    return None if request.param == "fresh" else str(tiny_adapter(tmp_path, base, seed=1))


def load(base, adapter, attention="sdpa", dtype="float64"):
    model = load_policy_model(base, adapter, LORA, seed=0, attention=attention, dtype=dtype)
    return model.to(getattr(torch, dtype))


def random_direction(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in trained_parameters(model).items()
    }


def exact_derivatives(model, direction):
    """[5] by functional_call and autograd: no hook, no packing, no merging."""

    class Substituted(torch.nn.Module):
        device, dtype = model.device, model.dtype
        get_base_model = staticmethod(model.get_base_model)

        def __call__(self, **inputs):
            return functional_call(model, self.params, kwargs=inputs)

    def logps(params):
        likelihood = Likelihood(Substituted().eval(), pack=False)
        likelihood.model.params = params
        return torch.cat([likelihood([group]) for group in SINGLE])  # alone: nothing to pad

    model.eval()
    return derivatives.per_sample_derivatives(logps, trained_parameters(model), direction)


def derive(name, model, direction, groups, *, pack, merged=True, head=None):
    likelihood, line = Likelihood(model, pack=pack), Line(model, direction)
    shared = line.head(head) if head else None

    def values_at(steps):
        with line.at(steps):
            return likelihood(groups, shared, steps)

    steps = torch.zeros(len(groups), dtype=model.dtype)
    with line.merged() if merged else nullcontext():
        if name == "fd":
            scale = derivatives.scale_of(direction)
            return derivatives.fd_derivatives(values_at, steps, scale)
        engine = {"jvp": derivatives.jvp_derivatives, "ghost": derivatives.ghost_derivatives}
        return engine[name](values_at, steps)


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("merged", [True, False])
def test_ghost_is_per_sample_backward(base, adapter, merged):
    model = load(base, adapter)
    direction = random_direction(model)
    exact = exact_derivatives(model, direction)
    single = derive("ghost", model, direction, SINGLE, pack=False, merged=merged)
    assert error(single, exact) <= 1e-6
    rows = derive("ghost", model, direction, GROUPS, pack=True, merged=merged)
    summed = torch.stack([exact[part].sum() for part in (FIRST, SECOND, THIRD)])
    assert error(rows, summed) <= 1e-6


@pytest.mark.parametrize(("name", "bound"), [("jvp", 1e-6), ("fd", 2e-3)])
def test_forward_passes_agree_too(base, adapter, name, bound):
    model = load(base, adapter, attention="eager")
    direction = random_direction(model)
    exact = exact_derivatives(model, direction)
    assert error(derive(name, model, direction, GROUPS, pack=True), exact) <= bound


def test_forward_mode_in_padded_batches(base, adapter):
    model = load(base, adapter, attention="eager", dtype="float32")
    direction = random_direction(model)
    exact = exact_derivatives(model, direction)
    assert error(derive("jvp", model, direction, SINGLE, pack=False), exact) <= 1e-5


@pytest.mark.parametrize(("name", "bound"), [("jvp", 1e-6), ("ghost", 1e-6), ("fd", 2e-3)])
def test_a_common_head_is_exact(base, adapter, name, bound):
    model = load(base, adapter, attention="eager" if name == "jvp" else "sdpa")
    direction, start = random_direction(model), [1, 40, 41, 42]
    groups = [[(start + prompt, response) for prompt, response in g] for g in GROUPS]
    plain = derive(name, model, direction, groups, pack=True)
    headed = derive(name, model, direction, groups, pack=True, head=start)
    assert error(headed, plain) <= bound


def test_the_step_is_what_changes_the_weights(base, adapter):
    """``Line.at`` moves log-probabilities as moved parameters do, to first order."""
    model = load(base, adapter)
    direction, likelihood = random_direction(model), Likelihood(model, pack=True)
    with torch.no_grad():
        here = likelihood(GROUPS)
        with Line(model, direction).at(torch.full((3,), 1e-4, dtype=torch.float64)):
            stepped = likelihood(GROUPS)
        for name, value in trained_parameters(model).items():
            value += 1e-4 * direction[name]
        moved = likelihood(GROUPS)
    assert float((here - moved).norm()) > 1e-4
    assert float((stepped - moved).norm()) <= 1e-2 * float((here - moved).norm())


def test_ghost_does_not_depend_on_the_batch(base, adapter):
    model = load(base, adapter, dtype="float32")
    direction = random_direction(model)
    whole = derive("ghost", model, direction, GROUPS, pack=True)
    parts = [derive("ghost", model, direction, [group], pack=True) for group in reversed(GROUPS)]
    assert error(torch.cat(parts[::-1]), whole) <= 1e-5


def test_ghost_in_bfloat16_autocast_is_near(base):
    model = load(base, None, dtype="float32")
    direction = random_direction(model)
    exact = derive("ghost", model, direction, SINGLE, pack=True)
    with torch.autocast("cpu", torch.bfloat16):
        near = derive("ghost", model, direction, SINGLE, pack=True)
    assert near.dtype == torch.float32
    assert 0 < error(near, exact) <= 0.05


def test_only_the_trained_adapter_moves_and_nothing_is_left_behind(base, tmp_path):
    model = load(base, str(tiny_adapter(tmp_path, base, seed=1)))
    assert REFERENCE in model.peft_config
    direction = random_direction(model)
    assert all(f".{TRAINED}." in name for name in direction)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    derive("ghost", model, direction, GROUPS, pack=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_not_a_lora_factor_is_refused(base):
    model = load(base, None)
    direction = random_direction(model)
    with pytest.raises(ModelError, match="extra: impact scores know the LoRA factors"):
        Line(model, direction | {"extra": torch.ones(1)})


def test_a_layer_that_sees_tokens_without_their_rows_is_refused(base):
    lora = LORA.model_copy(update={"targets": ["lm_head"]})
    model = load_policy_model(base, None, lora, seed=0)
    with pytest.raises(ModelError, match="lm_head: sees tokens out of their rows"):
        derive("ghost", model, random_direction(model), GROUPS, pack=True, merged=False)


def test_padded_rows_hold_one_exchange(base):
    with pytest.raises(ValueError, match="one exchange each"):
        Likelihood(load(base, None), pack=False)(GROUPS)
