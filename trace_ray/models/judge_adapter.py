"""Fits a LoRA judge adapter: classification by the verdict token.

All questions about one policy share a long prefix, so a batch of them is trained as one packed trie
(``packing``): about a third of the tokens.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trace_ray.config import JudgeFitConfig, LoraConfig
from trace_ray.core.judge_prompt import NO, YES, labelled_questions
from trace_ray.core.policy import Policy
from trace_ray.errors import ModelError
from trace_ray.models.chat import encode_prompt
from trace_ray.models.checkpoints import unreadable
from trace_ray.models.collate import BucketSampler
from trace_ray.models.device import fast_bfloat16, fast_dtype
from trace_ray.models.packing import Trie, build_trie
from trace_ray.types import LabelledResponse, Prompt

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

_log = logging.getLogger(__name__)
WORK = "work"  # the trainer's own folder, gone when the adapter is there


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What a fit that is broken off goes on from."""

    keep: Callable[[Path], None]
    """Takes a checkpoint's folder, in an earlier one's place."""
    restore: Callable[[Path], bool]
    """Writes the last checkpoint as the folder it is given; False without one."""
    every_s: float = 60.0


def verdict_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """Return the id of ``word`` as one token.

    Raises:
        ModelError: the vocabulary splits it.
    """
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"the judge's vocabulary has no single token for {word!r}")
    return ids[0]


def verdict_logits(
    model: Callable[..., Any], questions: Trie, yes: int, no: int, device: torch.device
) -> torch.Tensor:
    """Return logit(Yes) - logit(No) after each of N questions, [N] float32."""
    last = torch.tensor([path[-1] for path in questions.paths])
    logits = model(
        input_ids=questions.input_ids.to(device),
        position_ids=questions.position_ids.to(device),
        attention_mask=questions.attention_mask.to(device, getattr(model, "dtype", None)),
        logits_to_keep=last.to(device),
        use_cache=False,
    ).logits[0]
    return (logits[:, yes] - logits[:, no]).float()


def fit_judge_adapter(
    base: str,
    policy: Policy,
    labels: Sequence[LabelledResponse],
    config: JudgeFitConfig,
    out: Path,
    *,
    by_clause: bool,
    use_cpu: bool,
    on_step: Callable[[int, int], None],
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train the adapter on ``labels`` and save it into ``out`` (safetensors).

    Args:
        base: directory of the judge's base model.
        policy: whose clauses the questions hold.
        labels: responses with their true verdicts.
        config: rank, learning rate, epochs, batch size, seed.
        out: folder of the adapter.
        by_clause: train on questions about single clauses instead of the whole policy.
        use_cpu: train on the CPU.
        on_step: called with (step, all steps).
        checkpoints: an earlier attempt's, and this one's; the adapter is the same with or without.

    Raises:
        ModelError: by clause, no label says which clause it is about.
    """
    from trace_ray.models.families import load_tokenizer
    from trace_ray.models.fused_lora import fuse
    from trace_ray.models.policy_model import load_policy_model, save_adapter
    from trace_ray.models.trainer import StepCallback

    tokenizer = load_tokenizer(base)
    lora = LoraConfig(r=config.r, alpha=2 * config.r, dropout=0.0, targets="all-linear")
    model = load_policy_model(base, None, lora, seed=config.seed)
    fuse(model, fast_dtype())
    asked = _questions(policy, labels, by_clause=by_clause)
    trainer = _verdict_trainer(
        tokenizer,
        _sampler([request for request, *_ in asked], config),
        model=model,
        args=_arguments(config, out, use_cpu=use_cpu),
        train_dataset=[
            (encode_prompt(tokenizer, question, shared_system=True), said)
            for _, question, said in asked
        ],
        data_collator=_collate,
        callbacks=[StepCallback(on_step)],
    )
    last = None
    if checkpoints is not None:
        trainer.add_callback(_keeper(checkpoints))
        last = _restored(checkpoints, out / WORK / "last")
    trainer.train(resume_from_checkpoint=last)
    shutil.rmtree(out / WORK, ignore_errors=True)
    save_adapter(model, out)


def _restored(checkpoints: Checkpoints, folder: Path) -> str | None:
    """Return ``folder`` with the last checkpoint in it; None where there is none that can be read."""
    if not checkpoints.restore(folder):
        return None
    if damage := unreadable(folder):
        _log.warning("the judge's last checkpoint %s; its fit begins anew", damage)
        shutil.rmtree(folder)
        return None
    return str(folder)


def _keeper(checkpoints: Checkpoints) -> TrainerCallback:
    """Return the callback that has a checkpoint made and kept every so many seconds."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = time.monotonic() - self.last >= checkpoints.every_s

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            made = Path(args.output_dir, f"checkpoint-{state.global_step}")
            checkpoints.keep(made)
            shutil.rmtree(made)
            self.last = time.monotonic()

    return Keeper()


def _questions(
    policy: Policy, labels: Sequence[LabelledResponse], *, by_clause: bool
) -> list[tuple[Prompt, Prompt, bool]]:
    """Return (request, question about a reply to it, whether the answer is Yes)."""
    asked = [
        (row.prompt, question, violates)
        for row in labels
        for question, violates in labelled_questions(policy, row, by_clause=by_clause)
    ]
    if len({violates for *_, violates in asked}) < 2:
        raise ModelError(
            "the judge's labels answer no questions of both kinds: by clause, labels of violations "
            "have to name their 'clause'"
        )
    return asked


def _sampler(requests: Sequence[Prompt], config: JudgeFitConfig) -> BucketSampler:
    """Put replies to one request into one batch: the trie then holds the request once."""
    distinct = list(dict.fromkeys(requests))
    random.Random(config.seed).shuffle(distinct)
    place = {prompt: number for number, prompt in enumerate(distinct)}
    places = [place[request] for request in requests]
    return BucketSampler(places, config.batch_size, config.seed, span=len(places))


def _verdict_trainer(
    tokenizer: PreTrainedTokenizerBase, sampler: BucketSampler, **settings: Any
) -> Trainer:
    from transformers import Trainer

    yes, no = verdict_token(tokenizer, YES), verdict_token(tokenizer, NO)

    class VerdictTrainer(Trainer):
        """Binary cross-entropy on the verdict token's log-odds."""

        def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
            return sampler

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            odds = verdict_logits(model, inputs["questions"], yes, no, self.args.device)
            target = inputs["violates"].to(odds.device)
            return torch.nn.functional.binary_cross_entropy_with_logits(odds, target)

    return VerdictTrainer(**settings)


def _arguments(config: JudgeFitConfig, out: Path, *, use_cpu: bool) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out / WORK),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        bf16=fast_bfloat16(),
        use_cpu=use_cpu,
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        dataloader_pin_memory=False,
    )


def _collate(rows: Sequence[tuple[list[int], bool]]) -> dict[str, Any]:
    return {
        "questions": build_trie([ids for ids, _ in rows]),
        "violates": torch.tensor([float(violates) for _, violates in rows]),
    }
