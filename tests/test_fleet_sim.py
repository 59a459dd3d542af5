"""The simulated scheduler, and the page that quotes it."""

import random
from pathlib import Path

from benchmarks.fleet_sim import Cluster, Job, fleet, lower_bound, tables

ROOT = Path(__file__).parents[1]


def job(name, gpus, *stages):
    return Job(name, gpus, stages, gpus * sum(stages))


def test_the_page_holds_what_the_command_prints():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for part in tables().split("\n\n"):
        assert part.strip() in page


def test_a_schedule_known_by_hand():
    """Two nodes of 8: the 8-GPU job alone, both 4-GPU jobs side by side, the last one after them."""
    jobs = [job(0, 8, 10), job(1, 4, 9), job(2, 4, 9), job(3, 8, 5)]
    assert Cluster(2, None, random.Random(0)).run(jobs) == 14
    assert lower_bound(jobs, 2) == (80 + 36 + 36 + 40) / 16
    assert lower_bound([job(0, 8, 3), job(1, 8, 2), job(2, 8, 2)], 2) == 4


def test_no_schedule_beats_the_bound_and_losses_only_delay():
    for seed in range(5):
        jobs = fleet(60, random.Random(seed), 0.1)
        calm = Cluster(8, None, random.Random(seed)).run(jobs)
        lossy = Cluster(8, 3600.0, random.Random(seed))
        assert lower_bound(jobs, 8) <= calm
        assert lossy.run(jobs) > lower_bound(jobs, 8)
        assert lossy.lost > 0


def test_a_lost_job_keeps_its_finished_stages_and_checkpoints():
    from benchmarks.fleet_sim import CHECKPOINT_S, _rest

    begun = job(0, 1, 100, 4 * CHECKPOINT_S, 50)
    assert _rest(begun, 40).stages == (100, 4 * CHECKPOINT_S, 50)
    assert _rest(begun, 100 + 2.5 * CHECKPOINT_S).stages == (0, 2 * CHECKPOINT_S, 50)
    assert _rest(begun, 100 + 4 * CHECKPOINT_S + 10).stages == (0, 0, 50)
