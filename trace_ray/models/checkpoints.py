"""Whether a checkpoint of transformers can be gone on from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from trace_ray.models.adapters import WEIGHTS


def unreadable(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint of transformers; empty where every file can be read."""
    from safetensors import SafetensorError, safe_open

    for name in (WEIGHTS, "trainer_state.json"):
        if not (checkpoint / name).is_file():
            return f"has no {name}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as file:
                    if broken := file.testzip():
                        return f"{path.name} can't be read ({broken} is damaged)"
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
            return f"{path.name} can't be read ({error})"
    return ""
