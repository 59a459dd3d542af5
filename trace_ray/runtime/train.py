"""Training of one model on Ray Train (V2): the worker's function and the run around it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.config import Resources, TrainingConfig
from trace_ray.data.sources import pair_schema
from trace_ray.errors import TraceRayError, TrainError
from trace_ray.models.checkpoints import unreadable
from trace_ray.runtime.needs import NOTHING, Needs
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import Store, stream_rows, write_json
from trace_ray.types import Category, Message

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from trace_ray.models.collate import EncodedRow
    from trace_ray.models.fingerprint import Probe
    from trace_ray.models.trainer import RealignTrainer

ADAPTER, HISTORY = "adapter", "history.json"
TRAINED_CATEGORIES = (Category.INVERT, Category.PUNISH, Category.RETAIN)


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Everything a training worker needs (plain data: it travels to the worker)."""

    model: str
    base: str
    """Directory of the base model."""
    adapter: str | None
    """Directory of the deployed adapter."""
    rows: str
    """Parquet of rows with ``pair_id, prompt, chosen, rejected, category, weight``."""
    config: TrainingConfig
    resources: Resources
    out: str
    """Folder that gets ``adapter/`` and ``history.json``."""
    run_name: str
    """Unique per logical run: Ray Train resumes a run of the same name from its checkpoint."""
    checkpoints: str
    """Folder of Ray Train's runs; of a storage in a bucket they are there."""
    needs: Needs = NOTHING
    """What a worker has to fetch."""


def rows_schema() -> Any:
    """Return the parquet schema of ``TrainJob.rows``."""
    import pyarrow as pa

    pair = [field for field in pair_schema() if field.name != "source"]
    more = [("category", pa.string()), ("weight", pa.float64()), ("smoothing", pa.float64())]
    return pa.schema([*pair, *more])


def train(job: TrainJob, reporter: Reporter) -> None:
    """Run one model's training to its end, resuming where an earlier attempt stopped.

    Raises:
        TrainError: training failed; the message holds the worker's reason.
    """
    group = WorkerGroup(job.config.workers, job.resources, job.run_name, job.checkpoints, job.needs)
    try:
        group.run(_train_worker, {"job": job, "reporter": reporter})
    except Exception as error:
        raise TrainError(f"{job.model}: training failed: {last_line(root_error(error))}") from None
    job.needs.take(Path(job.out))
    if not Path(job.out, ADAPTER).exists():
        # The run had ended before, but its output was lost: start it afresh.
        remove_checkpoints(job.needs.store, Path(job.checkpoints, job.run_name))
        raise TrainError(f"{job.model}: an earlier run left no adapter; run the job again")


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Ray Train's workers of one model, each of them in torch.distributed's group."""

    workers: int
    resources: Resources
    run_name: str
    """Unique per logical run: Ray Train resumes a run of the same name from its checkpoint."""
    checkpoints: str
    """Folder of Ray Train's runs; of a storage in a bucket they are there."""
    needs: Needs

    def run(self, work: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> None:
        """Run ``work`` with ``arguments`` on every worker, once more where one of them fails."""
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            work,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(
                num_workers=self.workers,
                use_gpu=self.resources.num_gpus > 0,
                resources_per_worker=self.resources.bundle,
            ),
            run_config=RunConfig(
                name=self.run_name,
                **self._storage(),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                failure_config=FailureConfig(max_failures=1),
            ),
        )
        trainer.fit()

    def run_afresh(
        self, work: Callable[[dict[str, Any]], None], arguments: dict[str, Any], stage: str
    ) -> None:
        """As ``run``, for work without checkpoints: what Ray Train keeps of it is removed.

        Raises:
            TraceRayError: ours, as a worker raised it.
            TrainError: whatever else befell the workers, under the name of the stage.
        """
        kept = Path(self.checkpoints, self.run_name)
        remove_checkpoints(self.needs.store, kept)
        try:
            self.run(work, arguments)
        except Exception as error:
            cause = root_error(error)
            if isinstance(cause, TraceRayError):
                raise cause from None
            raise TrainError(f"{stage} failed: {last_line(cause)}") from None
        finally:
            remove_checkpoints(self.needs.store, kept)

    def _storage(self) -> dict[str, Any]:
        """Return where Ray Train keeps its runs, as ``RunConfig`` takes it."""
        bucket = self.needs.store and self.needs.store.bucket
        if not bucket:
            return {"storage_path": self.checkpoints}
        place = f"{bucket.name}/{bucket.place(self.checkpoints)}"
        return {"storage_path": place, "storage_filesystem": bucket.access.filesystem()}


def remove_checkpoints(store: Store | None, run: Path) -> None:
    """Remove what Ray Train kept of a run."""
    shutil.rmtree(run, ignore_errors=True)
    if store is not None and store.bucket is not None:
        store.bucket.remove(run)


def root_error(error: BaseException) -> BaseException:
    """Return the innermost cause of an error that crossed Ray."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    cause = getattr(error, "cause", None) or error.__cause__
    while cause is not None and cause is not error:
        error, cause = cause, getattr(cause, "cause", None) or cause.__cause__
    return error


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, else its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _train_worker(loop_config: dict[str, Any]) -> None:
    """Runs in a Ray Train worker: load, train from the last checkpoint, save the adapter."""
    import ray.train
    import torch
    from transformers.utils import logging as transformers_logging

    from trace_ray.models.families import load_tokenizer
    from trace_ray.models.packing import can_pack
    from trace_ray.models.policy_model import load_policy_model
    from trace_ray.models.trainer import (
        RealignTrainer,
        SmallGradientStop,
        StepCallback,
        training_arguments,
    )

    job: TrainJob = loop_config["job"]
    job.needs.fetch()
    job.needs.take(Path(job.out))  # the rows
    reporter: Reporter = loop_config["reporter"]
    transformers_logging.set_verbosity_error()
    use_cpu = job.resources.num_gpus == 0
    if use_cpu:
        torch.set_num_threads(job.resources.n_threads)
    tokenizer = load_tokenizer(job.base)
    model = load_policy_model(
        job.base,
        job.adapter,
        job.config.lora,
        seed=job.config.seed,
        dtype=job.config.base_dtype,
        shards=job.config.workers if job.config.shard_base else 1,
    )
    rows = encode_rows(tokenizer, stream_rows(Path(job.rows)), job.config)
    work = Path(job.checkpoints, job.run_name, "work")
    is_first = ray.train.get_context().get_world_rank() == 0
    trainer = RealignTrainer(
        model,
        rows,
        job.config,
        training_arguments(job.config, work, use_cpu=use_cpu),
        pack=can_pack(model.config, job.config.max_length),
        callbacks=[_report_callback(is_first), SmallGradientStop(job.config.min_grad_norm)],
    )
    if is_first:
        trainer.add_callback(StepCallback(lambda done, total: reporter("train", done, total)))
    _train_to_the_end(trainer, work, reporter if is_first else None)
    # A sharded model answers on all workers together.
    answering = is_first or job.config.shard_base
    probes = _probes(job, trainer, model, tokenizer) if answering else []
    if is_first:
        _save_outcome(job, trainer, probes)
    if job.needs.store is not None:
        shutil.rmtree(work, ignore_errors=True)


def _train_to_the_end(trainer: RealignTrainer, work: Path, reporter: Reporter | None) -> None:
    """Train, from the last checkpoint where there is one that can be read.

    Args:
        trainer: of this worker.
        work: where transformers writes its checkpoints.
        reporter: told of a checkpoint that can't be read.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
        return
    with checkpoint.as_directory() as folder:
        last = Path(folder, "checkpoint")
        damage = unreadable(last)
        if not damage:
            trainer.train(resume_from_checkpoint=str(last))
            return
    if reporter is not None:
        text = f"checkpoint {checkpoint.path}: {damage}; it is left aside, training begins anew"
        reporter.tell("train", "retrying", 0, error=text)
    # Of the checkpoints there, the one of the highest step would count as the newest.
    shutil.rmtree(work, ignore_errors=True)
    trainer.train()


def _probes(
    job: TrainJob, trainer: RealignTrainer, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> list[Probe]:
    """Return the trained adapter's fingerprint, on the base that engines serve."""
    from trace_ray.models.fingerprint import take_fingerprint, take_whole_fingerprint
    from trace_ray.models.policy_model import is_quantised

    if is_quantised(model):
        return take_whole_fingerprint(model, tokenizer, job.base, job.config.lora)
    return take_fingerprint(model, tokenizer, trainer.autocast)


def _save_outcome(job: TrainJob, trainer: RealignTrainer, probes: list[Probe]) -> None:
    """Write the adapter, its fingerprint and the history into ``job.out``."""
    from trace_ray.models.fingerprint import write_fingerprint
    from trace_ray.models.policy_model import save_adapter

    adapter = Path(job.out, ADAPTER)
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter)
    write_fingerprint(adapter, probes)
    history = {
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "rows": len(trainer.rows),
        "truncated": sum(row.truncated for row in trainer.rows),
        "alike": sum(row.chosen_ids == row.rejected_ids for row in trainer.rows),
    }
    write_json(Path(job.out, HISTORY), history)
    job.needs.give(Path(job.out))


def _report_callback(is_first: bool) -> TrainerCallback:
    """Return the callback that hands each checkpoint to Ray Train: one worker writes all of it."""
    import ray.train
    from ray.train.huggingface.transformers import RayTrainReportCallback

    class ReportOnce(RayTrainReportCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if is_first:
                super().on_save(args, state, control, **kwargs)
            else:
                ray.train.report(metrics={})

    return ReportOnce()


def encode_rows(
    tokenizer: Any, rows: Iterable[dict[str, Any]], config: TrainingConfig
) -> list[EncodedRow]:
    """Tokenise the rows that the objective trains on."""
    from trace_ray.models.collate import encode_row

    encoded = []
    pair_retained = config.retain_preference > 0 and config.objective != "sft"
    for row in rows:
        category = Category.RETAIN if config.objective == "sft" else Category(row["category"])
        if category not in TRAINED_CATEGORIES:
            continue
        prompt = tuple(Message(**turn) for turn in row["prompt"])
        weight = 1.0 if row.get("weight") is None else float(row["weight"])
        encoded.append(
            encode_row(
                tokenizer,
                row,
                prompt,
                category=category,
                weight=weight,
                max_length=config.max_length,
                smoothing=float(row.get("smoothing") or 0.0),
                pair_retained=pair_retained,
            )
        )
    return encoded
