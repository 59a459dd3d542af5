"""The evaluation section: what models are measured on, and who judges their answers."""

from __future__ import annotations

from pydantic import Field

from trace_ray.config.judge import JudgeConfig
from trace_ray.config.sections import Section

BUILT_IN = "builtin"
"""``evaluation.attacks``: the package's own."""


class EvaluationConfig(Section):
    """How a model is measured before and after."""

    prompts: str
    """jsonl of {prompt, bin[, must_mention]}: held-out prompts."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Measure on so many prompts, an even sample over the bins; null = all."""
    max_new_tokens: int = Field(default=48, ge=1)
    retention_prompts: str | None = None
    """jsonl of {prompt}: unrelated prompts for the token KL; null uses the built-in sample."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """A prompt this much like a training prompt (Jaccard index of three words in a row) isn't held out:
    the run is refused."""
    must_comply: str | None = None
    """jsonl of {prompt}: harmless prompts that must be answered; the gate compares how often they are
    refused. null = not measured."""
    blimp_pairs: int = Field(default=400, ge=0)
    """BLiMP pairs scored when TRACE_RAY_DATA is set; 0 = none."""
    tasks: list[str] = Field(default_factory=list)
    """Tasks of lm-evaluation-harness: the gate compares the first metric of each of their items, beside
    the BLiMP pairs. Their data sets come from the Hugging Face hub, or as the task file says."""
    task_files: str | None = None
    """Directory of task files (YAML) of one's own, for ``tasks``. Python that they name is run."""
    task_limit: int | None = Field(default=None, ge=1)
    """Items of each task, its first ones; null = all."""
    attacks: str | None = None
    """Attacks on the prompts that must be refused, before and after: ``builtin``, or a YAML file of
    ``{attacks: [{name, template, source}]}`` whose templates hold ``{prompt}``; null = not attacked."""
    attacks_per_prompt: int | None = Field(default=None, ge=1)
    """Attacks on each of these prompts, taken in turn; null = every one."""
    must_refuse: str | None = None
    """jsonl of {prompt}: requests that no attack may get a violating reply to; null = those of
    ``prompts`` in the bins invert and punish."""
    judge: JudgeConfig | None = None
    """Who says whether answers comply, for the measures and the gate; null = the clauses' checks. Its
    ``labels`` and ``min_auc`` hold as for the judge that triages, which it should not be."""
    complies_at: float | None = Field(default=None, gt=0, le=1)
    """A model that agrees with the policy on at least this share of ``prompts`` already, at the lower
    end of its 95% interval, is kept as it is; null = every model is realigned."""
    judge_agreement: int = Field(default=64, ge=0)
    """Held-out replies a model on which this judge is compared with the one that triaged; 0 = none."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def files(self) -> tuple[str, ...]:
        """Keys that name a file."""
        own = () if self.attacks == BUILT_IN else ("attacks",)
        prompts = ("prompts", "retention_prompts", "must_comply", "must_refuse")
        return (*prompts, "task_files", *own)
