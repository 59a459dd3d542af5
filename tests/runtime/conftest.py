"""One Ray for all tests of this folder: its workers, once they have imported torch, serve the next test."""

from collections.abc import Iterator

import pytest

from trace_ray.runtime.cluster import connected


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    with connected():
        yield
