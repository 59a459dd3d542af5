"""The trainer: transformers' loop with the hybrid objective, or plain fine-tuning (``sft``).

Only the loss, the batches and their order are ours; optimizer, schedule, clipping, checkpoints and
resuming are transformers.Trainer's. The reference pass runs on the same weights with the deployed
adapter switched in, in the same batch and precision, so that every margin is exactly 0 before the
first step (dropout aside); what it gave is used again in later epochs (``reference_logps``).
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from trace_ray.config import TrainingConfig
from trace_ray.core import logprobs, losses
from trace_ray.errors import TrainError
from trace_ray.models.attention import attention_blocks
from trace_ray.models.collate import BucketSampler, EncodedRow, HybridCollator, StepCollator
from trace_ray.models.compiled import compile_layers
from trace_ray.models.device import fast_dtype
from trace_ray.models.fused_lora import fuse
from trace_ray.models.policy_model import is_quantised, is_sharded, reference, save_adapter
from trace_ray.models.reference_logps import ReferenceLogps
from trace_ray.types import Category

if TYPE_CHECKING:
    from peft import PeftModel

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def response_logits(
    model: Callable[..., Any], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the predictions of the response tokens of ``batch``, padded or packed.

    Returns:
        Logits [K, V], and the row [S, R] int64 that predicts each response token.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    if "gather" in batch:
        # SDPA is silently wrong where an additive mask has another dtype than the queries.
        dtype = getattr(getattr(model, "module", model), "dtype", torch.float32)
        mask = inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
        blocks = attention_blocks(mask, batch["bounds"])
        kept = model(**inputs, blocks=blocks, logits_to_keep=batch["keep"], use_cache=False).logits[
            0
        ]
        return kept, batch["gather"]
    n, width = batch["labels"].shape
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits
    # The last position of each sequence predicts what would follow the response: no row names it.
    first = torch.arange(n, device=logits.device)[:, None] * (width + 1)
    return logits.flatten(0, 1), first + torch.arange(width, device=logits.device)


class RealignTrainer(Trainer):
    """``transformers.Trainer`` with TRACE's hybrid loss over rows of mixed categories."""

    def __init__(
        self,
        model: PeftModel,
        rows: Sequence[EncodedRow],
        config: TrainingConfig,
        args: TrainingArguments,
        *,
        pack: bool,
        callbacks: list[TrainerCallback] | None = None,
    ):
        """Prepare training.

        Args:
            model: from ``load_policy_model``; ``default`` is trained.
            rows: RETAIN, INVERT and PUNISH rows with their weights.
            config: the objective.
            args: from ``training_arguments``.
            pack: share common prefixes within a batch (``packing``) instead of padding it.
            callbacks: transformers' callbacks.
        """
        self.config, self.rows = config, list(rows)
        counts = Counter(row.category for row in self.rows)
        self.denominators = losses.Denominators.of_step(
            config.batch_size,
            counts[Category.INVERT] + counts[Category.PUNISH],
            counts[Category.RETAIN],
        )
        tokens = sum(len(row.chosen_ids) for row in self.rows)
        self.sft_tokens = config.batch_size * tokens / len(self.rows)
        self.terms: defaultdict[str, float] = defaultdict(float)
        self.steps_noted = 0
        self.step_ids: list[str] = []
        """Of the step's pairs, those of all workers."""
        self.share = 1
        """What this worker's losses are multiplied by: the workers average theirs."""
        self.reference_logps = ReferenceLogps()
        self.autocast = autocast_dtype(config)
        fuse(model, self.autocast)
        if config.compile:
            compile_layers(model, args.device)
        if is_quantised(model):  # transformers would leave it where it is
            model.to(args.device)
        place = {"rank": args.process_index, "workers": args.world_size}
        collator = StepCollator(HybridCollator(pack), config.max_tokens, **place)
        # transformers keeps no optimizer state of a sharded model. Of ours, what is trained is whole on
        # every worker, and so is the optimizer's state.
        args.save_only_model = is_sharded(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.rows,  # pyright: ignore[reportArgumentType]
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            callbacks=callbacks,
        )
        args.save_only_model = False
        # Our loss has global denominators already: micro-batches add up, they aren't averaged.
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return whole steps of rows, in the same order on every worker (``StepCollator`` divides them).

        Accelerate's own division would repeat rows to fill the last step.
        """
        lengths = [row.n_tokens for row in self.rows]
        size = self.config.batch_size
        loader: DataLoader[Any] = DataLoader(
            self.rows,  # pyright: ignore[reportArgumentType]
            batch_size=size,
            sampler=BucketSampler(lengths, size, self.config.seed),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create transformers' schedule; its warm-up, which begins at rate 0, never takes the only step."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward over the step's micro-batches; return the step's loss.

        With data-parallel workers: this worker's share, times their number, as gradients and logged
        losses are averaged over them.
        """
        # What dropout draws: a step of a resumed run draws the same.
        step, rank = self.state.global_step, self.args.process_index
        torch.manual_seed(_mixed(self.config.seed, step, rank))
        total = torch.zeros((), device=self.args.device)
        self.step_ids = inputs["pair_ids"]
        parts = list(zip(inputs["micro_batches"], inputs["counted"], strict=True))
        for left, (micro, counted) in zip(reversed(range(len(parts))), parts, strict=True):
            self.share = self.args.world_size if counted else 0
            with self.accelerator.no_sync(model) if left else nullcontext():
                total += super().training_step(model, micro, num_items_in_batch)
        self.steps_noted += 1
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the step's loss (a scalar)."""
        logits, at = self._predict(model, inputs)
        if self.config.objective == "sft":
            token_logps = logprobs.token_logps(logits, inputs["labels"], inputs["mask"], at)
            loss = losses.sft(token_logps, inputs["mask"], self.sft_tokens)
            self._note({"sft": loss.detach()})
        else:
            loss = self._hybrid_loss(model, inputs, logits, at)
        if not torch.isfinite(loss):
            raise self._not_finite("loss", self.state.global_step + 1, inputs["pair_ids"])
        return self.share * loss

    @staticmethod
    def _not_finite(what: str, step: int, pair_ids: Sequence[str]) -> TrainError:
        return TrainError(
            f"step {step}: the {what} is not finite; lower training.learning_rate, or look at these "
            f"pairs: {', '.join(pair_ids)}. The last checkpoint is kept."
        )

    def _predict(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Not transformers' bf16 option: it would turn the logits into a float32 copy.
        kind = batch["input_ids"].device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            return response_logits(model, batch)

    def _hybrid_loss(
        self, model: torch.nn.Module, batch: dict[str, Any], logits: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        n_rows, paired, scored = len(batch["category"]), batch["paired"], batch["scored"]
        retained = (batch["category"] == losses.RETAIN).nonzero().squeeze(1)
        # A row of which only the KL is asked needs no log-probability.
        mask = batch["mask"] * torch.cat([scored, scored[paired]])[:, None]
        # A sharded model's workers meet in every pass: none may leave out one that another needs.
        whole = not self.is_distributed_loading_by_transformers
        ref_logps = self.reference_logps.find(batch) if whole else None
        bare = self.accelerator.unwrap_model(model)
        with reference(bare):
            if ref_logps is None:
                ref_logits, ref_at = self._predict(bare, batch)
                ref_logps = logprobs.sequence_logps(ref_logits, batch["labels"], mask, ref_at)
                self.reference_logps.keep(batch, ref_logps)
                ref_at = ref_at[retained]
            elif len(retained):
                ref_logits, ref_at = self._predict(bare, batch["retained"])
            else:
                ref_logits, ref_at = logits, at[retained]
        logps = logprobs.sequence_logps(logits, batch["labels"], mask, at)
        logratio = logps - ref_logps
        lengths = batch["mask"].sum(1)
        kl = losses.retain_kl(logits, ref_logits, batch["mask"][retained], at[retained], ref_at)
        terms = losses.HybridTerms(
            chosen_logratio=logratio[:n_rows],
            rejected_logratio=losses.to_rows(logratio[n_rows:], paired, n_rows),
            kl=losses.to_rows(kl, retained, n_rows),
            category=batch["category"],
            weight=batch["weight"],
            chosen_length=lengths[:n_rows],
            rejected_length=losses.to_rows(lengths[n_rows:], paired, n_rows),
            chosen_logps=logps[:n_rows],
            rejected_logps=losses.to_rows(logps[n_rows:], paired, n_rows),
            smoothing=batch["smoothing"] if self.config.label_smoothing else None,
        )
        output = losses.hybrid(
            terms,
            self.denominators,
            loss=self.config.loss,
            beta=self.config.beta,
            alpha_kl=self.config.alpha_kl,
            rpo_alpha=self.config.rpo_alpha,
            retain_preference=self.config.retain_preference,
        )
        self._note(output.metrics)
        return output.loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # transformers would save the reference beside it, and then resume from the reference alone.
        folder = Path(output_dir or self.args.output_dir)  # pyright: ignore[reportArgumentType]
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.accelerator.unwrap_model(self.model), folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save none: each step has its own seed."""

    def _note(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self.terms[name] += self.share * float(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's terms of a step, averaged since the last log, to transformers' numbers.

        Every step is logged, before it is saved: the place to stop one whose gradient broke the weights.

        Raises:
            TrainError: the gradient is not finite, though the loss was.
        """
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise self._not_finite("gradient", self.state.global_step, self.step_ids)
        if self.steps_noted:
            names = sorted(self.terms)
            sums = torch.tensor([self.terms[name] for name in names], device=self.args.device)
            means: Any = self.accelerator.reduce(sums, "mean")
            logs |= dict(zip(names, (means / self.steps_noted).tolist(), strict=True))
            self.terms.clear()
            self.steps_noted = 0
        super().log(logs, start_time)


def _mixed(*numbers: int) -> int:
    """Return a seed of 64 bits that hangs on all of the numbers, and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class SmallGradientStop(TrainerCallback):
    """Stops when the gradient norm falls under epsilon (Algorithm 1's stopping rule)."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Ask the trainer to stop where the last gradient was small enough."""
        if self.epsilon and (logs or {}).get("grad_norm", float("inf")) < self.epsilon:
            control.should_training_stop = True


class StepCallback(TrainerCallback):
    """Tells ``on_step`` of each optimizer step and stamps log entries with the wall clock."""

    def __init__(self, on_step: Callable[[int, int], None]):
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call ``on_step(step, all steps)``."""
        self.on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add ``timestamp_ms`` to the entry just made."""
        if state.log_history:
            state.log_history[-1].setdefault("timestamp_ms", int(time.time() * 1000))


def autocast_dtype(config: TrainingConfig) -> torch.dtype | None:
    """Return the precision of the matmuls over float32 weights; None is float32."""
    if config.autocast == "auto":
        return fast_dtype()
    return torch.bfloat16 if config.autocast == "bfloat16" else None


def training_arguments(config: TrainingConfig, folder: Path, *, use_cpu: bool) -> TrainingArguments:
    """Translate our training section into transformers' arguments."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        weight_decay=0.0,
        use_cpu=use_cpu,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
