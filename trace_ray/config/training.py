"""The training section: objective, optimisation, adapter shape, impact scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trace_ray.config.sections import Section
from trace_ray.core.objectives import MAX_SMOOTHING, Objective


class LoraConfig(Section):
    """The adapter's shape (paper: r 32, alpha 16, dropout 0.1 on q_proj and v_proj)."""

    r: int = Field(default=32, ge=1)
    alpha: float = Field(default=16, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(default=["q_proj", "v_proj"])


class ImpactConfig(Section):
    """Alignment impact scores (method: stage 2)."""

    method: Literal["auto", "jvp", "ghost", "fd"] = "auto"
    """``ghost``: one batched backward pass, exact; ``jvp``: forward mode, exact, the check of the others;
    ``fd``: central difference in float32; auto = ghost."""
    gamma: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Damping: the Hessian is taken as gamma * I."""
    gold_batch: int = Field(default=64, ge=3)
    """Pairs in the gold batch (Algorithm 2)."""
    weights: Literal["l1", "mean", "category"] = "mean"
    """``l1``: weights sum to 1 (the paper); ``mean``: their mean is 1; ``category``: it is 1 among the
    INVERT pairs and among the PUNISH pairs."""
    power: float = Field(default=1.0, ge=0, le=1)
    """Exponent of the clamped scores: 1 = the paper's weights, 0.5 = less peaked."""
    batch_tokens: int = Field(default=1024, ge=1)
    """Tokens per forward pass; a row longer than that is a batch of its own."""
    preconditioner: Literal["none", "adam"] = "none"
    """``adam``: g_J is divided by sqrt(v) + 1e-8, v the mean square of the gold pairs' gradients."""
    autocast: Literal["none", "bfloat16"] = "none"
    """``bfloat16``: faster where the device is fast at it, scores about 1% off; not for ``fd``."""
    workers: int = Field(default=1, ge=1)
    """Ray tasks that share one model's scoring, each with the model's resources."""
    save_rows: int = Field(default=1024, ge=1)
    """Conflicts between checkpoints of the scoring."""

    @model_validator(mode="after")
    def _differences_need_precision(self) -> ImpactConfig:
        if self.method == "fd" and self.autocast != "none":
            raise ValueError(
                "finite differences in bfloat16 are noise: method ghost, or autocast none"
            )
        return self


class TrainingConfig(Section):
    """The objective and its optimisation (defaults: the paper's)."""

    objective: Objective = "trace"
    """``trace``, an ablation or a baseline (``core.objectives`` has the list), or ``sft``."""
    loss: Literal["dpo", "ipo"] = "dpo"
    """Preference loss on inverted pairs."""
    beta: float = Field(default=0.3, gt=0, allow_inf_nan=False)
    alpha_kl: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    rpo_alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the NLL of a pair's preferred response; 0 = the paper's loss."""
    retain_preference: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the preference that retained pairs still state, beside the KL; 0 = the paper's loss."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    epochs: float = Field(default=1, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps; null = by epochs."""
    batch_size: int = Field(default=4, ge=1)
    """Pairs per optimizer step."""
    max_tokens: int | None = Field(default=None, ge=16)
    """Tokens computed at once: a step with more is split into micro-batches; null = never split."""
    workers: int = Field(default=1, ge=1)
    """Data-parallel workers, each with the model's resources: they share out the rows of every step, so
    that the result is one worker's."""
    shard_base: bool = False
    """Of the base's weights each of ``workers`` holds its share and gets the others layer by layer (FSDP2):
    for models that don't fit one worker. The adapter is whole on each."""
    base_dtype: Literal["float32", "bfloat16", "nf4"] = "float32"
    """In which the base's frozen weights are loaded to score, train and measure; the adapter is float32.
    ``nf4``: 4 bits a weight of linear layers (QLoRA; needs bitsandbytes), the rest, experts that share one
    matrix too, in bfloat16, or in float32 where the device isn't fast at bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Train through torch's compiler (on a CPU it needs a C++ compiler): a minute or two at the beginning,
    for less memory, faster steps. The result is the same but for rounding; nothing trains anew for it."""
    label_smoothing: Literal["judge"] | Annotated[float, Field(ge=0, le=MAX_SMOOTHING)] = 0.0
    """Robust DPO: the rate of wrong triage labels, for every preference that is trained on; ``judge`` takes
    each inverted pair's from the judge's own probabilities; 0 = the paper's loss."""
    max_length: int = Field(default=512, ge=16)
    """Tokens of prompt plus response. Longer ones lose the prompt's beginning, as far as the response needs
    up to half of the tokens, then the response's tail; counted in the report."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rate rises to its full height."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    min_grad_norm: float = Field(default=0.0, ge=0)
    """Stop when the gradient norm falls under it (epsilon of Algorithm 1); 0 = never."""
    save_steps: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """Precision of the passes over float32 weights; auto = bfloat16 where the device is fast at it."""
    lora: LoraConfig = LoraConfig()
    impact: ImpactConfig = ImpactConfig()
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _workers_have_work(self) -> TrainingConfig:
        if self.workers > self.batch_size:
            raise ValueError(
                f"workers: {self.workers} can't share the {self.batch_size} pairs of a step; "
                "raise batch_size or take fewer workers"
            )
        if self.shard_base and self.workers == 1:
            raise ValueError("shard_base: needs workers: 2 or more, that share the base's weights")
        if self.shard_base and self.impact.workers > 1:
            raise ValueError(
                "impact.workers: of a sharded base the training's own workers score; leave it out"
            )
        if self.shard_base and self.impact.method == "jvp":
            raise ValueError("impact.method: jvp needs the whole base on one worker; take ghost")
        return self

    @model_validator(mode="after")
    def _smoothing_is_of_dpo(self) -> TrainingConfig:
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(
                f"label_smoothing: robust DPO has no counterpart for loss {self.loss}; leave it out, or "
                "take loss dpo"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_go_with_the_rest(self) -> TrainingConfig:
        if self.base_dtype == "nf4" and self.shard_base:
            raise ValueError(
                "base_dtype: a base in nf4 is whole on each worker; take bfloat16 for shard_base, or "
                "leave shard_base out"
            )
        if self.base_dtype == "nf4" and self.impact.method == "fd":
            raise ValueError(
                "impact.method: finite differences need base_dtype float32, as nf4 computes in "
                "bfloat16 where that is fast; take ghost"
            )
        return self
