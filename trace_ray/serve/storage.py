"""A fleet's storage in a bucket, as the nodes of an endpoint use it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field

from trace_ray.config import Section
from trace_ray.data.s3 import S3Access
from trace_ray.errors import StateError
from trace_ray.models.references import ModelSource
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.store import Store

_log = logging.getLogger("ray.serve")


class ServedBucket(Section):
    """A bucket from which nodes fetch what they serve."""

    url: str
    """``s3://bucket/prefix``."""
    root: str
    """Folder of the copy, on every node the same."""
    bases: list[ModelSource] = Field(default_factory=list)
    """Base models, which a node gets from where their references point."""

    def fetch_base(self, path: str) -> None:
        """Bring a base model to this node.

        Raises:
            ModelError: this node finds another one, or none.
        """
        Needs.of(self.store, [base for base in self.bases if base.path == path]).fetch()

    @property
    def bucket(self) -> Bucket:
        """The bucket, by this process's AWS variables."""
        return Bucket(self.url, self.root, S3Access.from_environment())

    @property
    def store(self) -> Store:
        """The fleet's store in it."""
        return Store(self.root, self.bucket)


class RecordSender:
    """Sends finished files of records to the bucket, each once; for any thread."""

    def __init__(self, bucket: Bucket, folder: str) -> None:
        """Take the place of the records in the copy; nothing is sent yet."""
        self._bucket, self._folder = bucket, Path(folder)
        self._sent: set[str] | None = None
        self._one = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._last: Future[None] | None = None
        self.problem = ""
        """Why the last files could not be sent; empty = they were."""

    @classmethod
    def of(cls, bucket: Mapping[str, Any] | None, folder: str | None) -> RecordSender | None:
        """Return the sender of an endpoint; None where nothing is recorded, or into a folder.

        Args:
            bucket: a ``ServedBucket`` as JSON.
            folder: of the records.
        """
        if bucket is None or folder is None:
            return None
        return cls(ServedBucket.model_validate(bucket).bucket, folder)

    def soon(self) -> None:
        """Send from another thread, unless that is under way."""
        if self._last is None or self._last.done():
            self._last = self._thread.submit(self.send)

    def send(self) -> None:
        """Send what was finished since, also by an endpoint before this one; never raises for S3."""
        with self._one:
            try:
                if self._sent is None:
                    self._sent = self._bucket.names(self._folder)
                for file in sorted(self._folder.glob("decisions-*.jsonl")):
                    if file.name not in self._sent:
                        self._bucket.push(file)
                        self._sent.add(file.name)
            except StateError as error:
                if not self.problem:
                    _log.error("records are not in the bucket yet: %s", error)
                self.problem = "records can't be sent to the bucket"
            else:
                self.problem = ""
