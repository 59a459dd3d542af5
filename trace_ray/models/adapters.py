"""LoRA adapters as folders of files: their identity, and whether they can be used and served."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trace_ray.errors import ModelError
from trace_ray.types import content_digest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
META = "trace_ray.json"
"""Beside the two files of peft: {base_digest}, the base model the adapter was trained on."""

_FUNCTION_FIELDS = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_dora",
    "use_rslora",
)
"""Fields of adapter_config.json that change what the adapter computes."""


_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Named initialisations that leave the base's weights alone, as vLLM has it; PiSSA's, OLoRA's, CorDA's and
LoftQ's don't."""


def adapter_sha256(folder: str | Path) -> str:
    """Return the identity of an adapter: sha256 of its weights' bytes and of its function's fields.

    Fields that don't change the function (paths, dropout, the library's version) don't count, so
    the same adapter saved elsewhere is the same.
    """
    folder = Path(folder)
    config = _read_config(folder)
    function = {name: _canonical(config.get(name)) for name in _FUNCTION_FIELDS}
    try:
        with (folder / WEIGHTS).open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise ModelError(f"{folder}: has no {WEIGHTS}; it is no LoRA adapter folder") from None
    return content_digest([weights, function])


def write_meta(folder: str | Path, base_digest: str) -> None:
    """Record in an adapter folder which base model it belongs to."""
    text = json.dumps({"base_digest": base_digest}) + "\n"
    Path(folder, META).write_text(text, encoding="utf-8")


def read_base_digest(folder: str | Path) -> str | None:
    """Return the recorded base model's digest; None where the folder doesn't say."""
    path = Path(folder, META)
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["base_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: must be JSON with a base_digest") from None
    return str(value)


def check_adapter(folder: str | Path, base_digest: str | None = None) -> None:
    """Check that an adapter can be trained on and served, on the base it is meant for.

    Args:
        folder: adapter_config.json and adapter_model.safetensors, as peft saves them.
        base_digest: digest of the base it shall sit on; compared where the folder records one.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    folder = Path(folder)
    config = _read_config(folder)
    found = _unsupported(config)
    if not (folder / WEIGHTS).is_file():
        pickled = " (pickled weights are refused: save with safe_serialization=True)"
        found.append(f"has no {WEIGHTS}" + (pickled if next(folder.glob("*.bin"), None) else ""))
    elif (problem := _weights_problem(folder / WEIGHTS)) is not None:
        found.append(problem)
    recorded = read_base_digest(folder)
    if base_digest is not None and recorded is not None and recorded != base_digest:
        found.append(
            f"was trained on another base model (digest {recorded[:8]}, this base is "
            f"{base_digest[:8]})"
        )
    if found:
        raise ModelError("\n".join(f"{folder}: {text}" for text in found))


def _unsupported(config: dict[str, Any]) -> list[str]:
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type must be LORA (got {config.get('peft_type')!r})")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        found.append(f"r must be a positive number (got {config.get('r')!r})")
    if config.get("use_dora"):
        found.append("DoRA adapters can't be served; train with use_dora false")
    if config.get("modules_to_save"):
        found.append("modules_to_save can't be served; an adapter holds LoRA matrices only")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("trained biases can't be served; use bias 'none' and lora_bias false")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        found.append(
            f"init_lora_weights {init!r} changes the base's own weights as it is loaded; convert it to "
            "a plain LoRA adapter (peft: path_initial_model_for_weight_conversion)"
        )
    for name in ("target_parameters", "layer_replication", "alora_invocation_tokens"):
        if config.get(name):
            found.append(f"{name} can't be served; put the LoRA on whole modules")
    return found


def _weights_problem(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        return f"{path.name} is not a complete safetensors file ({error})"
    return (
        None if any(".lora_A." in name for name in names) else f"{path.name} holds no LoRA matrix"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{folder}: has no {CONFIG}; it is no LoRA adapter folder") from None
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return config


def _canonical(value: Any) -> Any:
    """Order-free form of a config value: absent, null, false and empty are one."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = sorted(value)
    return value or None
