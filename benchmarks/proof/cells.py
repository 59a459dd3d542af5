"""The cells of the proof: each is one deployed model realigned by one objective under one seed."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trace_ray.types import content_digest

Data = Literal["synthetic", "hh"]
Variant = Literal["ours", "kept", "robust", "nll", "paper"]
"""``ours``: the NLL term on preferred responses, and the examples' weights; ``kept``: the same, and
retained pairs keep their preference (``retain_preference``); ``robust``: ``kept`` with the share of flipped
labels as ``label_smoothing``; ``nll``: the NLL term alone, with the paper's weights; ``paper``: the paper's
loss and weights."""
ROOT = Path(__file__).resolve().parents[2]
STORAGE = ".trace-ray/proof"

BASES = {"smollm2": "demo:smollm2", "gemma3": "demo:gemma3"}
EXAMPLES: dict[Data, tuple[str, str]] = {
    "synthetic": ("deployed.yaml", "quickstart.yaml"),
    "hh": ("hh-deployed.yaml", "hh-rlhf.yaml"),
}
"""Per data set the example that deploys the old policy and the one that realigns."""
PROMPTS: dict[Data, int] = {"synthetic": 96, "hh": 160}
"""Held-out prompts measured; the examples measure fewer."""
BLIMP_PAIRS = 600
FIT = {"r": 16, "learning_rate": 2.0e-3, "epochs": 2, "batch_size": 8}
"""Of the judge of the synthetic cells: the example's own has become longer and gentler since."""
KEPT = 0.3
"""``retain_preference`` of the variant ``kept``, chosen on prompts about the topics of the labels."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table before its seeds are averaged."""

    data: Data
    model: str
    objective: str
    seed: int = 0
    flip_labels: float = 0.0
    variant: Variant = "ours"

    @property
    def name(self) -> str:
        """A file name, unique among cells."""
        parts = [self.data, self.model, self.objective, f"s{self.seed}"]
        parts += [f"flip{self.flip_labels:g}"] if self.flip_labels else []
        return "-".join([*parts, *([] if self.variant == "ours" else [self.variant])])

    @property
    def model_name(self) -> str:
        """Name of the deployed model: one per data set, base and seed."""
        return f"{self.data}-{self.model}-s{self.seed}"

    def configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fleet configs that deploy the old policy and that realign."""
        deploy, realign = (_example(name) for name in EXAMPLES[self.data])
        model = {"name": self.model_name, "base": BASES[self.model], "resources": {"num_cpus": 1}}
        for config in (deploy, realign):
            config["models"] = [copy.deepcopy(model)]
            config["training"]["seed"] = self.seed
            config["storage"] = STORAGE
        realign["models"][0]["adapter"] = f"models:/trace-{self.model_name}@champion"
        realign["training"]["objective"] = self.objective
        realign["flip_labels"] = self.flip_labels
        if "fit" in realign.get("judge", {}):
            realign["judge"]["fit"] = FIT
        realign["training"].pop("retain_preference", None)
        if self.variant in ("kept", "robust"):
            realign["training"]["retain_preference"] = KEPT
        if self.variant == "robust":
            realign["training"]["label_smoothing"] = self.flip_labels
        if self.variant == "paper":
            realign["training"]["rpo_alpha"] = 0.0
        if self.variant in ("nll", "paper"):
            realign["training"]["impact"] |= {"weights": "mean", "power": 1.0}
        if self.objective in ("trace_oracle", "dpo_gold"):
            replies = Path(STORAGE, "..", "demo", "replies.jsonl")
            realign["oracle"] = {"kind": "file", "path": str(ROOT / replies)}
        evaluation = realign["evaluation"]
        evaluation |= {"max_prompts": PROMPTS[self.data], "blimp_pairs": BLIMP_PAIRS}
        return deploy, realign

    @property
    def key(self) -> str:
        """Digest of all that the cell asks for: a result under another key is out of date."""
        configs = self.configs()
        for config in configs:  # what changes no result
            del config["models"][0]["resources"]
            config.get("evaluation", {}).pop("judge_agreement", None)
        return content_digest([asdict(self), _portable(configs)])[:16]


def all_cells() -> list[Cell]:
    """Every cell of the table, the most telling first."""
    cells = []
    for seed in range(3):
        for objective in ("trace", "naive_dpo", "dpo_gold", "u2a"):
            cells.append(Cell("synthetic", "smollm2", objective, seed))
        cells.append(Cell("synthetic", "smollm2", "trace", seed, variant="kept"))
        cells += [
            Cell("synthetic", "smollm2", objective, seed, variant="paper")
            for objective in ("trace", "naive_dpo")
        ]
    cells.append(Cell("synthetic", "smollm2", "trace", variant="nll"))
    cells += [
        Cell("synthetic", "smollm2", objective)
        for objective in ("trace_oracle", "no_impact", "no_triage", "no_kl")
    ]
    cells += [
        Cell("synthetic", "smollm2", objective, flip_labels=share)
        for share in (0.1, 0.2)
        for objective in ("trace", "naive_dpo")
    ]
    cells += [
        Cell("synthetic", "smollm2", "trace", flip_labels=share, variant=variant)
        for share in (0.1, 0.2)
        for variant in ("kept", "robust")
    ]
    cells += [Cell("synthetic", "gemma3", objective) for objective in ("trace", "naive_dpo")]
    cells.append(Cell("synthetic", "gemma3", "trace", variant="kept"))
    for seed in range(3):
        cells += [
            Cell("hh", "smollm2", objective, seed) for objective in ("trace", "naive_dpo", "u2a")
        ]
    cells += [Cell("hh", "smollm2", objective) for objective in ("no_impact", "no_triage", "no_kl")]
    cells.append(Cell("hh", "smollm2", "trace", variant="kept"))
    return cells


def _example(name: str) -> dict[str, Any]:
    """Read an example with its inputs' paths made absolute."""
    folder = ROOT / "examples"
    config = yaml.safe_load((folder / name).read_text())
    config.pop("gate", None)  # decides nothing that the cells measure
    places = [(config, "policy"), (config["data"], "source"), (config["data"], "gold")]
    places += [(config.get("judge", {}), "labels"), (config.get("evaluation", {}), "prompts")]
    for section, key in places:
        if key in section:
            section[key] = str((folder / section[key]).resolve())
    return config


def _portable(value: Any) -> Any:
    """Take this checkout's place out of paths, so that a key is the same on every machine."""
    if isinstance(value, dict):
        return {key: _portable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(each) for each in value]
    return value.replace(str(ROOT), "") if isinstance(value, str) else value
