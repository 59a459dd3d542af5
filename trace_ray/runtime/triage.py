"""Triage at scale: Ray Data streams the pairs through an actor pool of judges.

``chosen`` is judged first, ``rejected`` only where ``chosen`` violates, and each distinct (prompt,
response) once: rows come sorted by prompt. Rules are cheaper than that sort and go without it.

An actor that dies is started again by Ray Data and its batch judged again: an output file appears
only when it is whole, so no row is lost or written twice.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_ray.config import Resources
from trace_ray.core import triage
from trace_ray.data.sources import pair_schema
from trace_ray.errors import JudgeError
from trace_ray.runtime.cluster import may_grow, node_cpus, own_errors, result
from trace_ray.runtime.judges import Exchange, JudgeSpec, usage_of
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import write_json
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.runtime.tally import Counting, Tally
from trace_ray.runtime.triaged import COUNTERS, MOST_ROWS, SPEED, sort_file, verdict_type
from trace_ray.runtime.verdict_store import VerdictStore
from trace_ray.types import Label, Prompt, Verdict, prompt_from_rows

_LOG_EVERY_S = 5.0
_RULE_BATCH = 4096
_BLOCKS_PER_ACTOR = 4

Log = Callable[[Mapping[str, float], int], None]


class TriageBatch:
    """The Ray Data actor: a batch of pair rows in, triaged rows out."""

    def __init__(
        self, spec: JudgeSpec, store: VerdictStore | None, counting: Counting | None = None
    ):
        self.model = spec.build()
        self.counting = counting or Counting(None)
        self.counting.start()
        self.judge = StoredJudge(spec, self.model, store)
        self.judge_both = spec.config.judge_both
        # What is here now stays: the collector needn't look at it again for every batch of rows.
        gc.freeze()

    def __call__(self, batch: Any) -> Any:
        """Triage one pyarrow table of pairs."""
        import pyarrow as pa

        before = self._counters()
        prompts = [_PromptKey(rows) for rows in batch.column("prompt").to_pylist()]
        chosen = self._judged(prompts, batch.column("chosen").to_pylist())
        needed = [i for i, v in enumerate(chosen) if self.judge_both or v.label is Label.VIOLATES]
        texts = batch.column("rejected").take(pa.array(needed, pa.int64())).to_pylist()
        rejected: list[Verdict | None] = [None] * len(prompts)
        for i, verdict in zip(
            needed, self._judged([prompts[i] for i in needed], texts), strict=True
        ):
            rejected[i] = verdict
        self.judge.flush()
        category = [str(triage.categorise(a, b)) for a, b in zip(chosen, rejected, strict=True)]
        spent = [now - was for now, was in zip(self._counters(), before, strict=True)]
        counts = Counter(category) + Counter(dict(zip(COUNTERS, spent, strict=True)))
        self.counting.add(counts | {"rows": len(prompts)})
        out = batch.select(pair_schema().names).cast(pair_schema())
        out = out.append_column("category", pa.array(category, pa.string()))
        out = out.append_column("verdict_chosen", _verdict_column(chosen))
        out = out.append_column("verdict_rejected", _verdict_column(rejected))
        for name, value in zip(COUNTERS, spent, strict=True):
            rest = [0] * (len(prompts) - 1)
            out = out.append_column(name, pa.array([value, *rest][: len(prompts)], pa.int64()))
        return out

    def _judged(self, prompts: Sequence[_PromptKey], responses: list[str]) -> list[Verdict]:
        ids = [p.response_id(text) for p, text in zip(prompts, responses, strict=True)]
        exchanges = [Exchange(p.prompt, text) for p, text in zip(prompts, responses, strict=True)]
        return self.judge.verdicts(exchanges, ids)

    def _counters(self) -> tuple[int, ...]:
        usage = usage_of(self.model)
        tokens = (usage.input_tokens, usage.output_tokens, usage.engine_tokens)
        return self.judge.calls, self.judge.hits, *tokens


class _PromptKey:
    """A prompt, and the content ids of replies to it: the same as ``types.response_id``, faster."""

    __slots__ = ("digest", "prompt")

    def __init__(self, rows: list[dict[str, str]]):
        self.prompt: Prompt = prompt_from_rows(rows)
        self.digest = hashlib.sha256(f"[{_canonical(rows)},".encode("utf-8", "surrogatepass"))

    def response_id(self, response: str) -> str:
        digest = self.digest.copy()
        digest.update(f"{_quoted(response)}]".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


_quoted = json.JSONEncoder(ensure_ascii=False).encode


def _canonical(rows: list[dict[str, str]]) -> str:
    """Return a prompt as ``types.content_digest`` writes it."""
    turns = [
        f'{{"content":{_quoted(row["content"])},"role":{_quoted(row["role"])}}}' for row in rows
    ]
    return f"[{','.join(turns)}]"


def _verdict_column(verdicts: Sequence[Verdict | None]) -> Any:
    """Return verdicts as one column: built field by field, and typed even where all are missing."""
    import pyarrow as pa

    # Rules say the same of many replies, with one object: each is written out once.
    distinct: dict[int, Verdict] = {id(v): v for v in verdicts if v is not None}
    places = {key: place for place, key in enumerate(distinct)}
    kind = verdict_type()
    fields = [
        pa.array([getattr(v, field.name) for v in distinct.values()], field.type) for field in kind
    ]
    each = pa.StructArray.from_arrays(fields, fields=list(kind))
    return each.take(pa.array([None if v is None else places[id(v)] for v in verdicts], pa.int64()))


def _with_prompt_key(table: Any) -> Any:
    """Add a digest of the prompt: rows of one prompt then sort into one batch."""
    import pyarrow as pa

    keys = [
        hashlib.sha256(_canonical(rows).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for rows in table.column("prompt").to_pylist()
    ]
    return table.append_column("prompt_key", pa.array(keys))


def _by_prompt(rows: Any, n_blocks: int) -> Any:
    """Return the dataset with the rows of one prompt side by side, in at most ``n_blocks`` blocks."""
    # Left to itself Ray Data sorts into 200, of however few rows.
    rows.context.default_hash_shuffle_parallelism = n_blocks
    return rows.map_batches(_with_prompt_key, batch_format="pyarrow").sort("prompt_key")


def triage_pairs(
    pairs: Path,
    out: Path,
    spec: JudgeSpec,
    store: VerdictStore | None,
    reporter: Reporter | None = None,
    log: Log | None = None,
) -> None:
    """Judge and triage parquet of pairs into the folder ``out``, which ``TriagedRows`` reads.

    Args:
        pairs: a parquet file, or a folder of them.
        out: folder to fill.
        spec: the judge.
        store: where verdicts are looked up and kept; None = nowhere.
        reporter: told after each batch how far and how fast it is.
        log: given the counts so far and the rows done every few seconds, and at the end.

    Raises:
        JudgeError: the cluster has no room for the judge, or the judge refuses every row alike.
        TraceRayError: an actor failed otherwise.
    """
    import pyarrow.dataset as ds
    import ray
    import ray.data

    total = ds.dataset(pairs, format="parquet").count_rows()
    actor: Any = ray.remote(num_cpus=0)(Tally)
    tally = actor.remote(total, reporter)
    batch_size = _RULE_BATCH if spec.kind == "rules" else spec.config.batch_size
    n_blocks = _n_blocks(total, batch_size, _actor_range(spec)[1])
    bucket = store and store.bucket
    if bucket and not bucket.holds(pairs):
        bucket.push(pairs)
    there = {"filesystem": bucket.access.filesystem()} if bucket else {}

    def place(path: Path) -> str:
        return f"{bucket.name}/{bucket.place(path)}" if bucket else str(path)

    rows = ray.data.read_parquet(place(pairs), override_num_blocks=n_blocks, **there)
    if spec.kind != "rules":
        rows = _by_prompt(rows, n_blocks)
    triaged = rows.map_batches(
        TriageBatch,
        fn_constructor_args=(spec, store, Counting(tally)),
        batch_size=batch_size,
        batch_format="pyarrow",
        **_actors(spec),
    )
    with own_errors():
        with _logged(tally, log):
            triaged.write_parquet(place(out), **there)
        if bucket:
            for path in bucket.pull(out).glob("*.parquet"):
                sort_file(path)
        else:
            sort: Any = ray.remote(sort_file)
            result([sort.remote(path) for path in out.absolute().glob("*.parquet")])
        write_json(out / SPEED, {"wall_s": result(tally.seconds.remote())})


@contextmanager
def _logged(tally: Any, log: Log | None) -> Iterator[None]:
    """Within the block, and once after it, give ``log`` what the tally holds."""
    if log is None:
        yield
        return
    import ray
    from ray.exceptions import RayError

    def tell() -> None:
        # For show: a tally that is lost stops no work.
        with contextlib.suppress(RayError):
            counts: Any = ray.get(tally.so_far.remote())
            log(counts, int(counts["rows"]))

    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(_LOG_EVERY_S):
            tell()

    thread = threading.Thread(target=follow, name="triage-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_LOG_EVERY_S)
    if not thread.is_alive():  # else MLflow doesn't answer: the triage is done without it
        tell()


def _actors(spec: JudgeSpec) -> dict[str, Any]:
    """Return the settings of the judge's actor pool, as ``map_batches`` takes them."""
    import ray.data

    fewest, most = _actor_range(spec)
    resources = _actor_resources(spec)
    _check_room(resources, fewest)
    # In the environment: Ray Data calls the judge from a thread that a setting made later can't reach.
    environment = {"OMP_NUM_THREADS": str(resources.n_threads)}
    options: dict[str, Any] = {
        **{name: value for name, value in resources.task_options.items() if value},
        "runtime_env": {"env_vars": environment},
        "compute": ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
    }
    return options


def most_held(spec: JudgeSpec) -> tuple[Resources, int]:
    """Return what an actor of a judge holds, and how many there are at most; Ray has to be up."""
    return _actor_resources(spec), _actor_range(spec)[1]


def _actor_resources(spec: JudgeSpec) -> Resources:
    return Resources(num_cpus=0.5) if _is_spread(spec) else spec.config.actor_resources


def _is_spread(spec: JudgeSpec) -> bool:
    """True for rules left alone: they take all cores but one of each node, and two actors share a core.

    Reading and writing leave time on that one core.
    """
    return spec.kind == "rules" and "actors" not in spec.config.model_fields_set


def _actor_range(spec: JudgeSpec) -> tuple[int, int]:
    """Return the fewest and the most actors."""
    if not _is_spread(spec):
        return spec.config.actor_range
    n = max(1, sum(2 * int(cpus - 1) for cpus in node_cpus()))
    return n, n


def _n_blocks(rows: int, batch_size: int, actors: int) -> int:
    """Return how many blocks Ray Data cuts the rows into: an actor takes a block at a time.

    Left to itself it cuts by bytes alone, and one actor of many would get all of a small file. A
    block holds at least a batch, and at most what one output file should hold.
    """
    wanted = max(_BLOCKS_PER_ACTOR * actors, math.ceil(rows / MOST_ROWS))
    return max(1, min(wanted, math.ceil(rows / batch_size)))


def _check_room(resources: Resources, actors: int) -> None:
    """Refuse a pool that leaves no core to read and write: Ray Data would wait for ever.

    Actors with parts of cores may leave a part on each node, so one core a node has to be free.
    """
    held, nodes = resources.num_cpus * actors, node_cpus()
    free = 1 if resources.num_cpus % 1 == 0 else max(1, len(nodes))
    if held + free > sum(nodes) and not may_grow():
        raise JudgeError(
            f"the judge's actors hold {held:g} of the cluster's {sum(nodes):g} CPUs, and reading needs "
            f"{free} more: lower judge.actors or judge.resources.num_cpus (threads can stay higher)"
        )
