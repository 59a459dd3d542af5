"""Labels dealt out for fitting, calibrating and measuring a judge."""

from trace_ray.core.calibration import split_labels
from trace_ray.types import LabelledResponse, Message


def test_a_repeated_label_is_not_held_out_from_itself():
    labels = [
        LabelledResponse((Message("user", f"q{i}"),), "a", bool(i % 2), "topic" if i == 3 else "")
        for i in range(30)
    ]
    again = [LabelledResponse(row.prompt, row.response, row.violates) for row in labels]
    split = split_labels(labels + again, seed=0)
    parts = [{row.prompt for row in part} for part in (split.fit, split.calibration, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert [len(split.fit), len(split.calibration), len(split.test)] == [36, 12, 12]
    alone = split_labels(labels, seed=0)
    assert [len(alone.fit), len(alone.calibration), len(alone.test)] == [18, 6, 6]
