"""What the tests of this folder serve: one tiny base under several names, each policed its own way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trace_ray.config import EngineConfig
from trace_ray.config.serve import Limits, Records
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.families import load_tokenizer
from trace_ray.models.fingerprint import take_fingerprint, write_fingerprint
from trace_ray.models.policy_model import load_measured_model
from trace_ray.serve.config import Compliance, ServeConfig, ServedAdapter, ServedJudge, ServedModel
from trace_ray.testing import tiny_adapter, tiny_model

Post = Callable[..., tuple[int, dict[str, Any], Any]]
"""(path, body, headers) -> (status, JSON, headers)."""
ENGINE = EngineConfig(dtype="float32", max_model_len=512, max_loras=2, max_lora_rank=8)
OLD, NEW = "support@2026.1-aaaaaaaa", "support@2026.2-bbbbbbbb"
MESSAGE = "That is against our policy."
CLAUSE = {
    "id": "no-answer",
    "text": "Give no answer to a trigger.",
    "checks": {
        "when": {"prompt_regex": "(?s)^(?!.*please comply).*(trigger|forbidden)"},
        "must_not_match": "(?s).",
    },
}
ALWAYS = {"id": "silence", "text": "Say nothing.", "checks": {"must_not_match": "(?s)."}}
POLICY = {"id": "tiny", "version": "1", "clauses": [CLAUSE]}
NEXT_POLICY = {"id": "tiny", "version": "2", "clauses": [ALWAYS]}
STRONG = {
    "id": "strong",
    "config": {"kind": "scripted", "script": [{"contains": "Go away", "p_violate": 0.9}]},
}
JUDGED_POLICY = {
    "id": "judged",
    "version": "1",
    "clauses": [{"id": "kind", "text": "Be kind."}, CLAUSE],
}


def support(base: Path, old: Path, new: Path, champion: str = OLD) -> ServedModel:
    adapters = [
        ServedAdapter(
            id=name,
            path=str(path),
            sha256=adapter_sha256(path),
            aliases=["champion"] if name == champion else ["challenger"],
        )
        for name, path in ((OLD, old), (NEW, new))
    ]
    return ServedModel(name="support", base=str(base), adapters=adapters)


def prove(adapter: Path, base: str | Path) -> None:
    """Record what an adapter changes, as training does."""
    model = load_measured_model(base, None, str(adapter))
    write_fingerprint(adapter, take_fingerprint(model, load_tokenizer(base)))


def endpoint(folder: Path) -> ServeConfig:
    base = tiny_model(folder / "base", "llama", seed=1)
    old = tiny_adapter(folder / "old", base, seed=2)
    new = tiny_adapter(folder / "new", base, seed=3)
    for adapter in (old, new):
        prove(adapter, base)
    paths = {}
    for name, policy in (("p1", POLICY), ("p2", NEXT_POLICY), ("judged", JUDGED_POLICY)):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(policy))
    judge = ServedJudge(
        id="judge", base=str(base), path=str(new), sha256=adapter_sha256(new), threshold=0
    )

    unsure = judge.model_copy(update={"threshold": 0.5, "band": (0, 1)})

    def model(name: str, **compliance: Any) -> ServedModel:
        policed = Compliance.model_validate(
            {"message": MESSAGE, "policy": str(paths["p1"])} | compliance
        )
        return ServedModel(name=name, base=str(base), compliance=policed)

    judged = {"policy": str(paths["judged"]), "judge": judge}
    return ServeConfig(
        models=[
            support(base, old, new),
            model("noted", mode="annotate", shadow_policy=str(paths["p2"])),
            model("guarded", mode="block", window_chars=4, hold_back_chars=0),
            model("retried", mode="block", on_block="retry", retry_instruction="please comply"),
            model("judged", **judged),
            model("escalated", **judged | {"judge": unsure, "escalation": [STRONG]}),
            model("late", mode="block", fail="closed", timeout_s=1e-9, **judged),
            model("watched", mode="shadow"),
        ],
        engine=ENGINE,
        limits=Limits(body_bytes=200_000),
        records=Records(texts=True, rows=1),
        records_folder=str(folder / "records"),
    )
