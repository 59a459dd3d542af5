"""log pi(y|x) of a policy model, at theta_ref or a step away from it along one direction.

``Likelihood`` lays exchanges out in rows (tries of exchanges that start alike, or one exchange per
row, padded) and evaluates them. ``Line`` puts a step t_i for each row i into the LoRA layers:

    h = W x + s B A x   becomes   h + t_i s (dB A + B dA) x

whose derivative in t_i at 0 is the directional derivative of row i along g = (dA, dB): forward mode,
one backward pass and finite differences (``core.derivatives``) all read it off the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trace_ray.core import logprobs
from trace_ray.core.derivatives import Params
from trace_ray.errors import ModelError
from trace_ray.models.collate import pad_sequences
from trace_ray.models.packing import pack_groups
from trace_ray.models.policy_model import TRAINED, is_quantised

if TYPE_CHECKING:
    from peft import PeftModel

Exchange = tuple[list[int], list[int]]
"""Prompt ids and response ids."""
Group = Sequence[Exchange]
"""Exchanges that share a row."""


class Likelihood:
    """log pi(y|x) under one model; its dropout is off for good."""

    def __init__(self, model: PeftModel, *, pack: bool):
        """Wrap ``model``.

        Args:
            model: from ``load_policy_model``.
            pack: share common prefixes within a group (exact where ``packing.can_pack`` says so);
                without it groups must hold one exchange each.
        """
        self.model, self.pack = model.eval(), pack

    def __call__(
        self, groups: Sequence[Group], head: Head | None = None, steps: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the log-probabilities [S] of all exchanges of the groups, in order.

        Args:
            groups: exchanges; each group makes a row.
            head: what ALL their prompts begin with (and go on after), computed before; needs ``pack``.
            steps: [N], the rows' steps along the head's line.
        """
        skip = len(head.ids) if head else 0
        if skip:
            groups = [[(prompt[skip:], response) for prompt, response in g] for g in groups]
        batch = pack_groups(groups) if self.pack else _pad(groups)
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        if self.pack:
            # SDPA is silently wrong where an additive mask has another dtype than the queries.
            mask = batch["attention_mask"].to(self.model.dtype)
            batch["attention_mask"] = torch.nn.functional.pad(mask, (skip, 0))
        inputs: dict[str, Any] = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "position_ids": batch["position_ids"] + skip,
        }
        if head is not None and steps is not None:
            inputs["past_key_values"] = head.cache(steps)
        with _predictions_at(self.model, batch["keep"]):
            logits = self.model(**inputs, use_cache=False).logits
        return logprobs.sequence_logps(logits, batch["labels"], batch["mask"], batch["gather"])


def _pad(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Lay out one exchange per row, with ``keep`` and ``gather`` as in ``pack_groups``."""
    if any(len(group) != 1 for group in groups):
        raise ValueError("padded rows hold one exchange each")
    batch = pad_sequences([exchange for (exchange,) in groups])
    n, width = batch["labels"].shape
    length = batch["input_ids"].shape[1]
    # The token ahead of each response token predicts it.
    before = torch.arange(length - width - 1, length - 1) + length * torch.arange(n)[:, None]
    real = batch["mask"].bool()
    gather = torch.zeros_like(batch["labels"])
    gather[real] = torch.arange(int(real.sum()))
    return batch | {"keep": before[real], "gather": gather}


@contextmanager
def _predictions_at(model: PeftModel, places: torch.Tensor) -> Iterator[None]:
    """Within the block logits are computed for those of all N * W tokens alone: [K, V]."""
    head = model.get_base_model().get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def select(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].flatten(0, 1)[places], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A common beginning of prompts (a system message, say), computed once for all rows.

    Its keys and values depend on the row's step, K(t) = K + t dK to first order, so they are kept with
    their slopes: derivatives through them are as exact as if each row had computed its own.
    """

    ids: list[int]
    states: list[tuple[torch.Tensor, torch.Tensor]]
    """Per layer K and V at theta_ref, [1, heads, tokens, width]."""
    slopes: list[tuple[torch.Tensor, torch.Tensor]]
    """Per layer dK/dt and dV/dt."""

    def cache(self, steps: torch.Tensor) -> Any:
        """Return transformers' cache of the head for rows at ``steps``, [N]."""
        from transformers import DynamicCache

        cache = DynamicCache()
        t = steps[:, None, None, None]
        for layer, (at, slope) in enumerate(zip(self.states, self.slopes, strict=True)):
            key, value = (a + (t * b).to(a.dtype) for a, b in zip(at, slope, strict=True))
            cache.update(key, value, layer)
        return cache


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """One LoRA layer's part of the direction: x (down) (up) = s (dB A + B dA) x."""

    name: str
    layer: torch.nn.Module
    down: torch.Tensor
    """[in, k]."""
    up: torch.Tensor
    """[k, out]."""


class Line:
    """The straight line theta_ref + t g through the trained adapter's weights."""

    def __init__(self, model: PeftModel, direction: Params):
        """Read each LoRA layer's part of the direction.

        Args:
            model: from ``load_policy_model``.
            direction: g, by the names of ``trained_parameters``.

        Raises:
            ModelError: the adapter has trained weights that are not LoRA factors of linear layers.
        """
        self.model = model
        self.factors = _factors(model, direction)

    @contextmanager
    def at(self, steps: torch.Tensor) -> Iterator[None]:
        """Within the block row i of a batch sees the weights at ``steps[i]``, [N]."""
        with ExitStack() as stack:
            for part in self.factors:
                handle = part.layer.register_forward_hook(_moved(part, steps[:, None, None]))
                stack.callback(handle.remove)
            yield

    def head(self, ids: list[int]) -> Head:
        """Compute a common beginning of prompts once, with its derivative along the line."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from transformers import DynamicCache

        def states(step: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
            cache = DynamicCache()
            tokens = torch.tensor([ids], device=step.device)
            with self.at(step):
                self.model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
            layers: list[Any] = cache.layers
            return [(layer.keys, layer.values) for layer in layers]

        here = torch.zeros(1, device=self.model.device, dtype=self.model.dtype)
        # Of SDPA's kernels the plain one has a forward-mode rule.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found, slopes = torch.func.jvp(states, (here,), (torch.ones_like(here),))[:2]
        return Head(ids, found, slopes)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block theta_ref's LoRA product is part of the base weights: fewer operations.

        Taking it out again leaves the base weights up to a rounding error away from what they were. Into
        quantised weights, of few values each, nothing is merged.
        """
        if is_quantised(self.model):
            yield
            return
        self.model.merge_adapter([TRAINED])
        try:
            yield
        finally:
            self.model.unmerge_adapter()


def _moved(part: _Factors, steps: torch.Tensor) -> Any:
    def hook(_layer: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        x = args[0]
        if x.dim() != 3 or len(x) != len(steps):
            raise ModelError(
                f"{part.name}: sees tokens out of their rows, so impact scores can't tell rows apart; "
                "take it out of training.lora.targets, or set training.objective to no_impact"
            )
        with torch.autocast(x.device.type, enabled=False):
            # The step multiplies the low-rank product, so at step 0 no gradient flows through x.
            low = x.detach().to(part.down.dtype) @ part.down
            return out + ((low * steps) @ part.up).to(out.dtype)

    return hook


def _has_factors(layer: Any) -> bool:
    """Say whether a layer is a linear one that is trained by LoRA, quantised or not."""
    from peft.tuners.lora import Linear, LoraLayer

    if not isinstance(layer, LoraLayer) or TRAINED not in layer.lora_A:
        return False
    # Over quantised weights peft's layer is of another class; GPT-2's Conv1D is linear to peft alone.
    return isinstance(layer, Linear) or isinstance(layer.get_base_layer(), torch.nn.Linear)


def _factors(model: PeftModel, direction: Params) -> list[_Factors]:
    left = dict(direction)
    found = []
    layers: Iterator[tuple[str, Any]] = model.named_modules()
    for name, layer in layers:
        if not _has_factors(layer):
            continue
        if TRAINED in layer.lora_variant:
            raise ModelError(
                f"{name}: impact scores know plain LoRA layers, not DoRA's and the like"
            )
        a, b = (getattr(layer, f"lora_{side}")[TRAINED].weight.detach() for side in "AB")
        d_a, d_b = (left.pop(f"{name}.lora_{side}.{TRAINED}.weight").to(a) for side in "AB")
        halves = [(a, d_b), (d_a, b)]  # s (dB A + B dA); a half that is 0 (B = 0) costs nothing
        halves = [half for half in halves if all(bool(factor.any()) for factor in half)]
        if not halves:
            continue
        down = torch.cat([half[0] for half in halves]).T.contiguous()
        up = (
            torch.cat([half[1] for half in halves], dim=1) * layer.scaling[TRAINED]
        ).T.contiguous()
        found.append(_Factors(name, layer, down, up))
    if left:
        raise ModelError(f"{min(left)}: impact scores know the LoRA factors of linear layers alone")
    return found
