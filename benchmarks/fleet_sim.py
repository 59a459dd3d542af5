"""The scheduler on paper: a discrete-event simulation of a fleet, and the arithmetic of a large one.

``python -m benchmarks.fleet_sim`` prints the tables of ``docs/scaling.md`` as markdown. A model is a job of
three stages on one node's GPUs; jobs start the largest first, each on the fullest node that has room. A
spot node that is lost takes its jobs back to their last finished stage or checkpoint. The lower bound is
what no scheduler can beat (``lower_bound``), stragglers included, nothing lost.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

PARAMETERS_B = ((7, 1), (13, 2), (34, 4), (70, 8))
"""Billions of parameters, and the GPUs of a job of that size (bfloat16 weights, activations, cache)."""
NODE_GPUS = 8
GPU_FLOPS = 4e14
"""What a GPU of a training node does in practice: 40% of 1e15 dense bfloat16 FLOP/s. Assumed."""
PAIRS, PAIR_TOKENS, CONFLICT_SHARE = 100_000_000, 600, 0.15
"""The organisation's pairs, tokens of one (both responses), share that conflicts. Assumed."""
TRAINED_PAIRS, PROMPTS, PROMPT_TOKENS = 200_000, 2_000, 400
"""Pairs one model is trained on and scored for (a sample), prompts it is measured on."""
CHECKPOINT_S, PROVISION_S = 600.0, 300.0
"""Between checkpoints; until a lost node is replaced."""
SPOT_MTBF_S, STRAGGLERS, SLOWDOWN = 24 * 3600.0, 0.05, 2.0
"""Mean life of a spot node; share of stages that are slow, and by how much."""
SEEDS = 5


@dataclass(frozen=True, slots=True)
class Job:
    """One model: its GPUs and the seconds of its stages."""

    name: int
    gpus: int
    stages: tuple[float, ...]
    size: float
    """GPU-seconds as planned: what the scheduler knows, stragglers not included."""

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.stages)


def stage_seconds(billions: float, gpus: int) -> tuple[float, ...]:
    """Return seconds to score, train and measure: FLOP per parameter and token over the GPUs' rate.

    6 to score (forward, backward to the activations, the direction), 6 to train a LoRA adapter (no
    weight gradients, plus the reference's forward pass), 2 each for two passes of answers.
    """
    conflicts = TRAINED_PAIRS * CONFLICT_SHARE
    tokens = (conflicts * PAIR_TOKENS, TRAINED_PAIRS * PAIR_TOKENS, 2 * PROMPTS * PROMPT_TOKENS)
    flop = [each * n * billions * 1e9 for each, n in zip((6, 6, 2), tokens, strict=True)]
    return tuple(each / (gpus * GPU_FLOPS) for each in flop)


def fleet(n: int, rng: random.Random, stragglers: float) -> list[Job]:
    """Return ``n`` jobs of mixed sizes, some of their stages slow."""
    jobs = []
    for name in range(n):
        billions, gpus = rng.choice(PARAMETERS_B)
        stages = stage_seconds(billions, gpus)
        slowed = tuple(s * (SLOWDOWN if rng.random() < stragglers else 1) for s in stages)
        jobs.append(Job(name, gpus, slowed, gpus * sum(stages)))
    return jobs


def lower_bound(jobs: Sequence[Job], nodes: int) -> float:
    """Return the seconds that no schedule on so many nodes can beat.

    All work over all GPUs; the longest job; and, as two jobs of more than half a node never share one,
    of the k * nodes + 1 longest such jobs some k + 1 follow each other.
    """
    work = sum(job.seconds * job.gpus for job in jobs)
    alone = sorted((job.seconds for job in jobs if 2 * job.gpus > NODE_GPUS), reverse=True)
    ends = range(0, len(alone), nodes)
    chains = [sum(alone[end - k : end + 1]) for k, end in enumerate(ends)]
    return max(work / (nodes * NODE_GPUS), max(job.seconds for job in jobs), *chains)


@dataclass(frozen=True, slots=True)
class Running:
    """A job on a node."""

    job: Job
    began: float
    end: int
    """Number of its end event: one of a job that was lost is not its end."""


class Cluster:
    """The simulated cluster: list scheduling, the largest first, on nodes that may be lost."""

    def __init__(self, nodes: int, mtbf_s: float | None, rng: random.Random):
        self.free = dict.fromkeys(range(nodes), NODE_GPUS)
        self.running: dict[int, dict[int, Running]] = {node: {} for node in self.free}
        self.mtbf_s, self.rng = mtbf_s, rng
        self.events: list[tuple[float, int, str, int, int]] = []
        self.serial = self.lost = 0
        for node in self.free:
            self._may_be_lost(node, 0.0)

    def run(self, jobs: Iterable[Job]) -> float:
        """Return the makespan in seconds."""
        waiting = sorted(jobs, key=_size)
        left, now = len(waiting), 0.0
        self._start(waiting, now)
        while left:
            now, serial, kind, node, name = heapq.heappop(self.events)
            if kind == "end":
                found = self.running[node].get(name)
                if found is None or found.end != serial:
                    continue
                del self.running[node][name]
                self.free[node] += found.job.gpus
                left -= 1
            elif kind == "lost":
                self.lost += 1
                waiting += [_rest(r.job, now - r.began) for r in self.running[node].values()]
                waiting.sort(key=_size)
                self.running[node].clear()
                self.free[node] = 0
                self._push(now + PROVISION_S, "back", node)
            else:
                self.free[node] = NODE_GPUS
                self._may_be_lost(node, now)
            self._start(waiting, now)
        return now

    def _start(self, waiting: list[Job], now: float) -> None:
        """Start what fits, the largest first; a smaller one may go before one that has no room."""
        room, kept = max(self.free.values()), []
        for job in waiting:
            if job.gpus > room:
                kept.append(job)
                continue
            rooms = (node for node, free in self.free.items() if free >= job.gpus)
            node = min(rooms, key=lambda each: (self.free[each], each))
            self.free[node] -= job.gpus
            room = max(self.free.values())
            end = self._push(now + job.seconds, "end", node, job.name)
            self.running[node][job.name] = Running(job, now, end)
        waiting[:] = kept

    def _may_be_lost(self, node: int, now: float) -> None:
        if self.mtbf_s is not None:
            self._push(now + self.rng.expovariate(1 / self.mtbf_s), "lost", node)

    def _push(self, at: float, kind: str, node: int, name: int = -1) -> int:
        self.serial += 1
        heapq.heappush(self.events, (at, self.serial, kind, node, name))
        return self.serial


def _size(job: Job) -> tuple[float, int]:
    """Largest first, and always in the same order."""
    return -job.size, job.name


def _rest(job: Job, done_s: float) -> Job:
    """Return what a job has still to do: finished stages count, training from its last checkpoint."""
    stages = []
    for number, seconds in enumerate(job.stages):
        if done_s >= seconds:
            done_s -= seconds
            continue
        kept = done_s // CHECKPOINT_S * CHECKPOINT_S if number == 1 else 0.0
        stages.append(seconds - kept)
        done_s = 0.0
        stages += job.stages[number + 1 :]
        break
    pad = (0.0,) * (len(job.stages) - len(stages))
    return replace(job, stages=pad + tuple(stages))


SCENARIOS = (
    ("calm", None, 0.0),
    ("stragglers", None, STRAGGLERS),
    ("spot losses", SPOT_MTBF_S, 0.0),
    ("both", SPOT_MTBF_S, STRAGGLERS),
)


def simulate(n: int, nodes: int, mtbf_s: float | None, stragglers: float) -> tuple[float, ...]:
    """Return mean makespan and mean lower bound (hours), worst ratio and mean nodes lost over seeds."""
    spans, bounds, lost = [], [], 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        jobs = fleet(n, rng, stragglers)
        cluster = Cluster(nodes, mtbf_s, rng)
        spans.append(cluster.run(jobs))
        bounds.append(lower_bound(jobs, nodes))
        lost += cluster.lost
    worst = max(span / bound for span, bound in zip(spans, bounds, strict=True))
    return sum(spans) / SEEDS / 3600, sum(bounds) / SEEDS / 3600, worst, lost / SEEDS


def schedule_table() -> Iterator[str]:
    """Yield the table of simulated fleets."""
    head = (
        "models | 8-GPU nodes | scenario | makespan, h | lower bound, h | worst ratio | nodes lost"
    )
    yield from _head(head)
    for n, nodes in ((10, 2), (100, 16), (1000, 128)):
        for name, mtbf_s, stragglers in SCENARIOS:
            span, bound, worst, lost = simulate(n, nodes, mtbf_s, stragglers)
            yield f"| {n} | {nodes} | {name} | {span:.2f} | {bound:.2f} | {worst:.3f} | {lost:.1f} |"


def model_table() -> Iterator[str]:
    """Yield what one model costs, by size."""
    yield from _head(
        "parameters | GPUs | weights, GB | score, h | train, h | measure, h | GPU-hours"
    )
    for billions, gpus in PARAMETERS_B:
        hours = [seconds / 3600 for seconds in stage_seconds(billions, gpus)]
        cells = " | ".join(f"{each:.2f}" for each in hours)
        yield f"| {billions}B | {gpus} | {2 * billions} | {cells} | {sum(hours) * gpus:.1f} |"


def data_table() -> Iterator[str]:
    """Yield what the pairs cost once for the fleet: bytes and the judge's tokens."""
    calls = PAIRS * (1 + 1.5 * CONFLICT_SHARE)
    tokens = calls * (PAIR_TOKENS / 2 + JUDGE_OVERHEAD)
    hours = 2 * JUDGE_BILLIONS * 1e9 * tokens / GPU_FLOPS / 3600
    yield from _head("what | amount | how")
    rows = (
        ("pairs in parquet", f"{PAIRS * PAIR_BYTES / 1e9:.0f} GB", f"{PAIR_BYTES} bytes a pair"),
        ("judge calls", f"{calls / 1e6:.0f} M", "chosen, and rejected where chosen violates"),
        ("judge tokens", f"{tokens / 1e9:.0f} G", f"{JUDGE_OVERHEAD} beside the cached policy"),
        ("judging, GPU-hours", f"{hours:.0f}", f"a {JUDGE_BILLIONS}B judge, 2 FLOP a parameter"),
        ("stored verdicts", f"{calls * VERDICT_BYTES / 1e9:.0f} GB", f"{VERDICT_BYTES} bytes each"),
        ("known verdicts in a judge actor", f"{calls * 40 / 1e9:.1f} GB", "40 bytes each"),
        ("triaged rows in the driver", f"{PAIRS / 64 * PAIR_BYTES / 1e9:.1f} GB", "1 in 64"),
        (
            "conflicts in a scoring worker",
            f"{PAIRS * CONFLICT_SHARE * ROW_BYTES / 1e9:.1f} GB",
            "Python objects",
        ),
    )
    yield from (f"| {what} | {amount} | {how} |" for what, amount, how in rows)


JUDGE_BILLIONS, JUDGE_OVERHEAD = 8, 40
"""Size of the judge; tokens of a question beside the policy (whose prefix is cached) and the reply."""
PAIR_BYTES, VERDICT_BYTES, ROW_BYTES = 1_200, 60, 2_500
"""Of a pair in parquet, of a stored verdict, of a triaged pair as a Python object. Assumed."""


def _head(columns: str) -> list[str]:
    return [f"| {columns} |", "|" + " --- |" * len(columns.split(" | "))]


def tables() -> str:
    """Return all tables as markdown."""
    parts = (
        ("One model", model_table()),
        ("The pairs, once for the fleet", data_table()),
        ("The fleet", schedule_table()),
    )
    return "\n".join(f"### {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts)


if __name__ == "__main__":
    print(tables(), end="")
