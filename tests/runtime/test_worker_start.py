"""Each worker of a cluster of ours imports no more than it needs."""

import gc
import importlib.util
import sys

import pytest

from trace_ray.runtime.cluster import connected


@pytest.fixture(scope="module")
def cluster():
    with connected():
        yield


def test_a_worker_imports_transformers_without_what_it_never_uses(cluster):
    import ray

    @ray.remote
    def look():
        from transformers import PreTrainedModel
        from transformers.generation import candidate_generator

        scipy_came = "scipy.stats" in sys.modules
        import sklearn.metrics

        return (
            PreTrainedModel.__name__,
            candidate_generator.__name__ in sys.modules,
            scipy_came,
            callable(sklearn.metrics.roc_curve),
            gc.isenabled(),
            gc.get_freeze_count() > len(gc.get_objects()),
        )

    # What hides a package ends with the import: whoever asks for it afterwards has it.
    assert ray.get(look.remote()) == ("PreTrainedModel", True, False, True, True, True)


def test_a_module_that_fails_to_load_leaves_nothing_hidden(cluster, tmp_path):
    import ray

    (tmp_path / "broken.py").write_text("import wave\n")

    @ray.remote
    def look():
        from trace_ray.runtime import worker_start

        worker_start.SLOW["broken"] = "wave"
        sys.path.insert(0, str(tmp_path))
        with pytest.raises(ImportError, match="wave"):
            import broken  # noqa: F401

        return importlib.util.find_spec("wave") is not None, gc.isenabled()

    assert ray.get(look.remote()) == (True, True)
