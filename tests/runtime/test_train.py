"""Training on Ray Train: any number of workers, the same result."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from trace_ray.config import Resources, TrainingConfig
from trace_ray.errors import TrainError
from trace_ray.runtime.store import stream_rows, write_rows
from trace_ray.runtime.train import TrainJob, train
from trace_ray.testing import tiny_adapter, tiny_model

LORA = {"r": 8, "alpha": 16, "dropout": 0, "targets": ["q_proj", "v_proj"]}
KINDS = ("invert", "retain", "punish", "invert", "retain", "punish", "invert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    write_rows(
        path,
        [
            {
                "pair_id": f"p{i}",
                "prompt": [{"role": "user", "content": f"question {i}" * (i + 1)}],
                "chosen": f"no {i}",
                "rejected": f"yes {i}, of course",
                "category": kind,
                "weight": 0.5 + i / 7,
            }
            for i, kind in enumerate(KINDS)
        ],
    )
    return path


def breaks_once(mark: Path, step: int):
    """Return a reporter that fails at ``step``, the first time."""

    def report(stage, done=0, total=0, note=""):
        if done == step and not mark.exists():
            mark.touch()
            raise RuntimeError("the worker broke")

    return report


def damages_once(folder: Path, name: str, step: int):
    """Return a reporter that cuts a file of the last checkpoint off and fails, once, at ``step``."""

    class Reporter:  # in here, so that it travels to a worker by value
        def __call__(self, stage, done=0, total=0, note=""):
            if done == step and not (folder / "damaged").exists():
                (folder / "damaged").touch()
                (path,) = folder.glob(f"checkpoints/*/checkpoint_*/checkpoint/{name}")
                path.write_bytes(path.read_bytes()[:-100])
                raise RuntimeError("the worker broke")

        def tell(self, stage, what, attempt=1, error=""):
            with (folder / "told").open("a") as file:
                file.write(f"{stage} {what} {attempt} {error}\n")

    return Reporter()


def small_job(folder, base, deployed, rows, **settings):
    """A job of 9 steps with checkpoints at 4 and 8."""
    config = TrainingConfig.model_validate(
        {
            "batch_size": 3,
            "epochs": 3,
            "learning_rate": 1e-2,
            "save_steps": 4,
            "autocast": "none",
            "max_length": 64,
            "lora": LORA,
            **settings,
        }
    )
    return TrainJob(
        model=folder.name,
        base=base,
        adapter=deployed,
        rows=str(rows),
        config=config,
        resources=Resources(num_cpus=1, threads=1),
        out=str(folder),
        run_name=folder.name,
        checkpoints=str(folder.parent / "checkpoints"),
    )


CUT_OFF = "adapter_model.safetensors"


def test_two_workers_train_what_one_does_whatever_befalls_them(cluster, rows, tmp_path):
    """One worker begins anew, its checkpoint damaged; of two with shards of the base, one breaks."""
    base = str(tiny_model(tmp_path / "base"))
    deployed = str(tiny_adapter(tmp_path / "deployed", base, seed=1))
    found, nothing = {}, lambda *_, **__: None
    faults = {
        "one": damages_once(tmp_path, CUT_OFF, 6),
        "sharded": breaks_once(tmp_path / "broken", 6),
    }
    # 3 rows a step: two workers share them unevenly, and the last step has a row for one alone.
    for name, settings in {
        "one": {"workers": 1},
        "two": {"workers": 2, "max_tokens": 40},
        "sharded": {
            "workers": 2,
            "max_tokens": 40,
            "shard_base": True,
            "gradient_checkpointing": True,
        },
    }.items():
        out = tmp_path / name
        job = small_job(out, base, deployed, rows, **settings)
        train(job, faults.get(name, nothing))
        history = json.loads((out / "history.json").read_text())
        weights = load_file(str(next((out / "adapter").glob("*.safetensors"))))
        found[name] = history, weights
        assert Path(tmp_path, "checkpoints", name).exists()
    assert (tmp_path / "broken").exists()
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert told.startswith(f"train retrying 0 checkpoint {tmp_path}/checkpoints/one/checkpoint_")
    assert f"{CUT_OFF} can't be read" in told
    one, a = found.pop("one")
    for other, b in found.values():
        assert one["steps"] == other["steps"] == 9
        for left, right in zip(one["log"], other["log"], strict=True):
            for name in ("loss", "grad_norm", "invert", "punish", "kl_sum", "n_punish"):
                if name in left:
                    assert right[name] == pytest.approx(left[name], rel=1e-3, abs=1e-5), name
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_broken_gradient_leaves_no_adapter(cluster, rows, tmp_path):
    broken = tmp_path / "rows.parquet"
    first, *rest = stream_rows(rows)
    write_rows(broken, [first | {"weight": 3e38}, *rest])
    config = {"batch_size": 3, "save_steps": 1, "autocast": "none", "lora": LORA}
    job = TrainJob(
        model="m",
        base=str(tiny_model(tmp_path / "base")),
        adapter=None,
        rows=str(broken),
        config=TrainingConfig.model_validate(config),
        resources=Resources(num_cpus=1, threads=1),
        out=str(tmp_path / "out"),
        run_name="broken",
        checkpoints=str(tmp_path / "checkpoints"),
    )
    with pytest.raises(TrainError, match=r"step \d: the gradient is not finite.*\bp0\b"):
        train(job, lambda *_, **__: None)
    assert not (tmp_path / "out" / "adapter").exists()


def test_more_workers_than_pairs_of_a_step_are_refused():
    with pytest.raises(ValueError, match="can't share the 2 pairs"):
        TrainingConfig.model_validate({"workers": 3, "batch_size": 2})


def test_a_base_is_shared_by_several_workers_only():
    with pytest.raises(ValueError, match="shard_base: needs workers: 2"):
        TrainingConfig.model_validate({"shard_base": True})
    sharing = {"workers": 2, "shard_base": True}
    for impact, why in (({"workers": 2}, "own workers score"), ({"method": "jvp"}, "take ghost")):
        with pytest.raises(ValueError, match=why):
            TrainingConfig.model_validate(sharing | {"impact": impact})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: robust DPO has no counterpart"),
        ({"loss": "ipo", "label_smoothing": "judge"}, "label_smoothing: robust DPO"),
        ({"warmup_ratio": 1}, "warmup_ratio"),  # to transformers, one step
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"epochs": float("inf")}, "epochs"),
        ({"alpha_kl": float("nan")}, "alpha_kl"),
    ],
)
def test_settings_that_would_mean_something_else_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        TrainingConfig.model_validate(settings)
