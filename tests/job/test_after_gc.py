"""An older run applied again after ``trace-ray gc`` took its stages."""

import json
import shutil

import pytest
from small_fleet import here, make_fleet, report_of

from trace_ray.rollout.parallel import keep_result, kept_results
from trace_ray.rollout.plan import read_inputs
from trace_ray.runtime.cluster import connected


@pytest.fixture(scope="module")
def up():
    with connected():
        yield


def test_models_whose_files_are_gone_are_made_anew_or_reported_without(tmp_path, up):
    config = make_fleet(tmp_path)
    done = here("apply", config)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "storage/latest/models/other.json").read_text())
    shutil.rmtree(made["scores_path"])  # as gc does once another run is the newest
    done = here("apply", config, "--only", "good")
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    assert [model["name"] for model in report["models"]] == ["good"]
    assert report["unchanged"].keys() == {"other"}
    assert "were removed" in report["unchanged"]["other"]
    done = here("apply", config)
    assert done.returncode == 0, done.stderr
    assert [model["name"] for model in report_of(tmp_path)["models"]] == ["good", "other"]


@pytest.mark.parametrize("name", ["scores_path", "answers_path", "adapter_path"])
def test_a_result_is_kept_as_long_as_its_files(tmp_path, name):
    inputs = read_inputs(str(make_fleet(tmp_path)))
    place = tmp_path / "there"
    keep_result(inputs, "good", {name: str(place), "adapter_sha256": "a"})
    keep_result(inputs, "other", {"error": "no room"})
    place.write_text(json.dumps([]))
    assert kept_results(inputs).keys() == {"good", "other"}
    place.unlink()
    assert kept_results(inputs).keys() == {"other"}
    assert kept_results(inputs, whole=False).keys() == {"good", "other"}
