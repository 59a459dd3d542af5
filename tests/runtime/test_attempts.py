"""A stage that fails is tried again where that can help."""

import time
from types import SimpleNamespace

import pytest

from trace_ray.config.sections import RetriesConfig
from trace_ray.errors import ModelError, TrainError
from trace_ray.rollout.attempts import attempt


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.events = []

    def __call__(self, *_, **__):
        pass

    def tell(self, stage, what, attempt, **_):
        self.events.append((stage, what, attempt))


def failing(times, error):
    left = [error] * times

    def work():
        if left:
            raise left.pop()
        return SimpleNamespace(reused=False, wall_s=1.0)

    return work


def test_a_stage_is_tried_again_after_a_pause_that_doubles():
    told, started = Told(), time.monotonic()
    attempt(told, RetriesConfig(attempts=3, backoff_s=0.1), "train", failing(2, TrainError("x")))
    assert time.monotonic() - started >= 0.1 + 0.2
    assert [what for _, what, _ in told.events] == [
        "running",
        "retrying",
        "running",
        "retrying",
        "running",
        "done",
    ]
    assert told.events[-1] == ("train", "done", 3)


@pytest.mark.parametrize(("error", "tries"), [(TrainError("lost"), 2), (ModelError("bad"), 1)])
def test_the_last_attempt_fails_and_bad_input_is_not_repeated(error, tries):
    told = Told()
    with pytest.raises(type(error)):
        attempt(told, RetriesConfig(attempts=2, backoff_s=0), "score", failing(9, error))
    assert told.events[-1] == ("score", "failed", tries)
