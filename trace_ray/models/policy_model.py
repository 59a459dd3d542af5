"""A base model with its trained adapter and its reference, in one copy of the base weights.

``default`` is the adapter being trained. The reference is the deployed model: the adapter ``ref``
where one is deployed, else the base with adapters off.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.config import LoraConfig
from trace_ray.errors import ModelError
from trace_ray.models.device import bound_kernel_cache
from trace_ray.models.families import family_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAINED, REFERENCE = "default", "ref"
NF4 = "nf4"
"""Of the base's precisions, the one that is no dtype of torch's."""


def load_policy_model(
    base: str | Path,
    adapter: str | Path | None,
    lora: LoraConfig,
    *,
    seed: int,
    attention: str = "sdpa",
    dtype: str = "float32",
    shards: int = 1,
) -> PeftModel:
    """Load ``base`` with a trainable adapter, a copy of the deployed one where there is one.

    Args:
        base: directory of safetensors weights.
        adapter: directory of the deployed adapter; None where the base itself is deployed.
        lora: shape of a fresh adapter, initialised by peft under ``seed`` right after the base is loaded;
            of a copy of the deployed one its dropout counts, the rest has to be the same.
        seed: of the fresh adapter's A matrices.
        attention: transformers' attention implementation; ``sdpa`` goes block by block where a batch
            is packed, and is ``eager`` for a model whose attention it doesn't know.
        dtype: of the frozen base weights, or ``nf4``; adapters are float32.
        shards: workers that hold a share of the base's weights each (FSDP2), all of them calling this at
            once; adapters are whole on each.

    Raises:
        ModelError: the base can't be loaded, or lacks a layer of ``lora.targets``, or the deployed adapter
            doesn't fit it or has another shape than ``lora``.
    """
    import peft
    import torch

    model = _load_base(base, attention, dtype, shards)
    torch.manual_seed(seed)
    if adapter is None:
        targets = family_of(model.config.model_type).lora_targets(lora.targets)
        if lora.targets != "all-linear":
            _check_targets(model, targets, base)
        fresh = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(model, fresh)  # pyright: ignore[reportReturnType]
    _check_shape(Path(adapter), lora, model)
    with _fitting(adapter, base):
        copied: Any = peft.PeftConfig.from_pretrained(str(adapter))
        copied.lora_dropout = lora.dropout  # of this training, not of the deployed adapter's
        wrapped = peft.PeftModel.from_pretrained(
            model, str(adapter), adapter_name=TRAINED, is_trainable=True, config=copied
        )
    _load_matrices(wrapped, REFERENCE, adapter, base)
    wrapped.set_adapter(TRAINED)
    return wrapped


@contextmanager
def _fitting(adapter: str | Path, base: str | Path) -> Iterator[None]:
    """Within the block peft's word that an adapter's matrices have no place in the base is ours.

    Raises:
        ModelError: names both.
    """
    try:
        with warnings.catch_warnings():
            # ``_load_matrices`` refuses what peft warns of.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            yield
    except (RuntimeError, ValueError) as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ModelError(
            f"{adapter}: doesn't fit the base {base}; give the base it was trained on: {why}"
        ) from None


def _load_matrices(model: PeftModel, name: str, adapter: str | Path, base: str | Path) -> None:
    """Load a saved adapter as ``name``, over the one of that name where there is one.

    peft leaves out matrices that have no place, and leaves fresh what gets none.

    Raises:
        ModelError: there are such; names both folders and a matrix of each kind.
    """
    with _fitting(adapter, base):
        found = model.load_adapter(str(adapter), adapter_name=name)
        lost = [key for key in found.unexpected_keys if ".lora_" in key]
        said = []
        if lost:
            said.append(f"{len(lost)} of its matrices have no place there, e.g. {lost[0]}")
        if fresh := found.missing_keys:
            said.append(f"{len(fresh)} matrices there get none of it, e.g. {fresh[0]}")
        if said:
            raise ValueError("; ".join(said))


def load_measured_model(
    base: str | Path, before: str | None, after: str, dtype: str = "float32", shards: int = 1
) -> PeftModel:
    """Load ``base`` with the realigned adapter as ``default`` and the deployed one, if any, as ``ref``.

    Args:
        base: directory of safetensors weights.
        before: directory of the deployed adapter; None = the base.
        after: directory of the realigned adapter.
        dtype: of the base's weights, or ``nf4``.
        shards: as for ``load_policy_model``.

    Raises:
        ModelError: the base can't be loaded, or an adapter doesn't fit it.
    """
    import peft
    import torch

    model = _load_base(base, "sdpa", dtype, shards)
    with _fitting(after, base):
        wrapped = peft.PeftModel.from_pretrained(model, after, adapter_name=TRAINED)
    _load_matrices(wrapped, TRAINED, after, base)
    if before is not None:
        _load_matrices(wrapped, REFERENCE, before, base)
        wrapped.set_adapter(TRAINED)
    if shards == 1 and torch.cuda.is_available():
        wrapped.to("cuda")
    return wrapped


def _load_base(base: str | Path, attention: str, dtype: str, shards: int = 1) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    from trace_ray.models.attention import BLOCKWISE

    bound_kernel_cache()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype, None)}
    if dtype == NF4:
        options = _quantising()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(base),
            attn_implementation=BLOCKWISE if attention == "sdpa" else attention,
            use_safetensors=True,
            distributed_config=DistributedConfig(fsdp_size=shards) if shards > 1 else None,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{base}: can't be loaded as a causal language model: {error}") from None
    if dtype == NF4:
        from trace_ray.models.nf4 import unify

        unify(model)
    if attention == "sdpa" and not _has_sdpa(model):
        model.set_attn_implementation("eager")
    return model


def _quantising() -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to quantise; it puts the model on the GPU where there is one.

    Raises:
        ModelError: bitsandbytes isn't installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "training.base_dtype: nf4 needs bitsandbytes, which isn't installed: "
            "pip install 'trace-ray[gpu]', or set bfloat16"
        )
    from trace_ray.models.nf4 import quantisation, whole_dtype

    return {"dtype": whole_dtype(), "quantization_config": quantisation()}


def _has_sdpa(model: PreTrainedModel) -> bool:
    """Say whether ``sdpa`` is the model's own attention.

    It drops, without a word, what it has no argument for: Gemma 2's cap on the logits, and the sinks of
    models that transformers says can't use it. It never hears of ours, so never refuses it.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return capped is None and model._supports_sdpa


def _check_targets(model: PreTrainedModel, targets: Sequence[str], base: str | Path) -> None:
    """Refuse targets of which one names no layer, or one that is not linear.

    peft takes a list of which one names a layer, and embeddings too, whose factors nothing here knows.
    """
    from torch import nn

    layers = [(f".{name}", isinstance(layer, nn.Linear)) for name, layer in model.named_modules()]
    bad = []
    for target in targets:
        kinds = [linear for name, linear in layers if name.endswith(f".{target}")]
        if not target or not all(kinds) or not kinds:
            bad.append(target)
    if bad or not targets:
        known = sorted({name.rpartition(".")[2] for name, linear in layers if linear})
        raise ModelError(
            f"training.lora.targets (--lora-targets): {', '.join(map(repr, bad)) or 'none'}: not a linear "
            f"layer of {base}, which has {', '.join(known)}; all-linear takes all but lm_head"
        )


def _check_shape(adapter: Path, lora: LoraConfig, model: PreTrainedModel) -> None:
    """Refuse a deployed adapter whose shape is not the one asked for."""
    saved = json.loads((adapter / "adapter_config.json").read_text())
    targets = saved["target_modules"]
    same = saved["r"] == lora.r and float(saved["lora_alpha"]) == float(lora.alpha)
    if lora.targets != "all-linear":
        asked = family_of(model.config.model_type).lora_targets(lora.targets)
        same = same and isinstance(targets, list) and set(targets) == set(asked)
    elif isinstance(targets, list):  # what a pattern (text) takes, peft alone knows
        same = same and _takes_all_linear(targets, model)
    if not same:
        named = sorted(targets) if isinstance(targets, list) else repr(targets)
        found = f"r {saved['r']}, alpha {saved['lora_alpha']}, targets {named}"
        raise ModelError(
            f"{adapter}: the deployed adapter has {found}; training.lora asks for r {lora.r}, "
            f"alpha {lora.alpha}, targets {lora.targets}. Set training.lora to the deployed shape."
        )


def _takes_all_linear(targets: Sequence[str], model: PreTrainedModel) -> bool:
    """Say whether an adapter's targets are all layers that a fresh one for ``all-linear`` would take."""
    from torch import nn

    asked = family_of(model.config.model_type).lora_targets("all-linear")
    head = model.get_output_embeddings()
    ends = tuple(f".{target}" for target in targets)
    return all(
        f".{name}".endswith(ends)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
        if asked == "all-linear" or name.rpartition(".")[2] in asked
    )


def is_sharded(model: PeftModel) -> bool:
    """Say whether each worker holds a share of the base's weights only."""
    return bool(model.get_base_model().is_distributed_loading_by_transformers)


def is_quantised(model: PeftModel) -> bool:
    """Say whether the base's linear layers are held in fewer bits than they compute with."""
    return bool(getattr(model.get_base_model(), "is_quantized", False))


@contextmanager
def reference(model: PeftModel) -> Iterator[None]:
    """Within the block ``model`` is the deployed one, without dropout and without gradients."""
    import torch
    from trl.trainer.utils import use_adapter

    training = model.training
    model.eval()
    deployed = REFERENCE if REFERENCE in model.peft_config else None
    try:
        with torch.no_grad(), use_adapter(model, deployed):
            yield
    finally:
        model.train(training)


def trained_parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the trained adapter's parameters by name, in the model's order."""
    return {name: value for name, value in model.named_parameters() if f".{TRAINED}." in name}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the trained adapter alone (safetensors and its config) into ``folder``."""
    # Not the whole model's state: of a sharded one, all workers would have to ask for it.
    trained = {name: value.detach() for name, value in trained_parameters(model).items()}
    model.save_pretrained(
        str(folder), selected_adapters=[TRAINED], state_dict=trained, safe_serialization=True
    )
    (folder / "README.md").unlink(missing_ok=True)
