"""Datasets of the Hugging Face Hub, streamed by the ``datasets`` library.

``hf://owner/name[/config][@revision][:split]``; the split is ``train`` unless named. As everywhere
in ``datasets``, a folder ``owner/name`` under the working directory is taken in place of the Hub's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trace_ray.errors import DataError
from trace_ray.types import content_digest

SCHEME = "hf://"
_NAME = re.compile(
    r"hf://(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)


def open_split(name: str) -> tuple[Any, str]:
    """Return a split as a streaming dataset, with a digest of its files' addresses and versions.

    Nothing but the dataset's list of files is downloaded. A file on the Hub has the commit as its
    version, a local one its time of change.

    Raises:
        DataError: the name can't be read, or the library finds no such dataset, config or split.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise DataError(f"{name}: must be hf://owner/name[/config][@revision][:split]")
    import datasets

    datasets.disable_progress_bars()
    split = found["split"] or "train"
    try:
        builder = datasets.load_dataset_builder(
            found["path"],
            found["config"],
            revision=found["revision"],
            token=os.environ.get("HF_TOKEN"),
        )
        dataset = builder.as_streaming_dataset(split=split)
    except Exception as error:  # the library passes on whatever the Hub, its cache or a file raise
        raise _explained(name, error) from None
    files: Any = builder.config.data_files
    versions = [list(files[split]), files[split].origin_metadata] if files else builder.hash
    return dataset, content_digest(versions)


def resharded(name: str, dataset: Any) -> Any:
    """Return the dataset with one shard per row group, where its files are parquet.

    Raises:
        DataError: a file can't be opened.
    """
    try:
        return dataset.reshard()
    except Exception as error:  # reads each file's footer
        raise _explained(name, error) from None


def shard_rows(
    name: str, dataset: Any, first: int, last: int | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number from 1, row) of a streaming dataset's shards from ``first`` up to ``last``.

    Raises:
        DataError: a shard can't be read to its end.
    """
    line = 0
    try:
        for index in range(
            first, dataset.num_shards if last is None else min(last, dataset.num_shards)
        ):
            for row in dataset.shard(num_shards=dataset.num_shards, index=index, contiguous=True):
                line += 1
                yield line, row
    except Exception as error:  # any of the library's readers may fail, each in its own way
        raise DataError(
            f"{name}: can't be read after row {line} of shard {first}: {error}"
        ) from None


def _explained(name: str, error: Exception) -> DataError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, ConnectionError):
        advice = (
            "the Hub can't be reached (offline, or HF_HUB_OFFLINE is set); download the dataset where "
            "there is a network and name its files"
        )
    else:
        advice = "check the name, config, revision and split, and HF_TOKEN for a gated dataset"
    return DataError(f"{name}: can't be opened as a dataset: {text}; {advice}")
