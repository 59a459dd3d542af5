"""Objects of an S3 bucket as data files: listed with their ETags, read by byte ranges.

Endpoint, region and keys come from the usual AWS variables of the process that starts a run and
travel with the work, so that workers need no settings of their own; where no keys are set, boto3
looks for them as it always does (profile, instance role).
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from trace_ray.errors import DataError

SCHEME = "s3://"
_VARIABLES = {
    "aws_access_key_id": ("AWS_ACCESS_KEY_ID",),
    "aws_secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
    "aws_session_token": ("AWS_SESSION_TOKEN",),
    "region_name": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
}
_BUFFER = 4 << 20
_ATTEMPTS = 3
"""Of a body that breaks off."""
_REQUESTS = 5
"""Of a request that S3 throttles or that gets no answer; the pauses grow to 20 s."""
_SLOWED = (
    f"S3 throttled the requests, also the last of {_REQUESTS} with growing pauses; run again later (what "
    "is done is kept), with fewer workers at once or more key prefixes"
)
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; check its name and AWS_ENDPOINT_URL",
    "AccessDenied": "access denied; the keys need s3:ListBucket and s3:GetObject there (a storage "
    "also s3:PutObject and s3:DeleteObject)",
    "403": "access denied; the keys need s3:ListBucket and s3:GetObject there",
    "InvalidAccessKeyId": "S3 does not know AWS_ACCESS_KEY_ID; check the keys and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "the session token has expired; get new keys and run again",
    "NoSuchKey": "the object was deleted after it was listed; run again",
    "PreconditionFailed": "the object was replaced after it was listed; run again",
    "InvalidToken": "the session token is not valid; get new keys and run again",
    "SlowDown": _SLOWED,
    "Throttling": _SLOWED,
    "ThrottlingException": _SLOWED,
    "RequestLimitExceeded": _SLOWED,
    "TooManyRequests": _SLOWED,
    "ServiceUnavailable": _SLOWED,
    "503": _SLOWED,
    "429": _SLOWED,
}


@dataclass(frozen=True, slots=True)
class S3Access:
    """How to reach S3; plain data, so that it can go to a worker."""

    settings: tuple[tuple[str, str], ...] = field(repr=False)
    """Arguments of ``boto3.client``; hidden from ``repr``, since keys are among them."""

    @classmethod
    def from_environment(cls) -> S3Access:
        """Read this process's AWS variables."""
        found = {
            argument: next((os.environ[name] for name in names if os.environ.get(name)), None)
            for argument, names in _VARIABLES.items()
        }
        return cls(tuple((name, value) for name, value in found.items() if value is not None))

    def client(self) -> Any:
        """Return a boto3 client, one per process."""
        return _client(self)

    def filesystem(self) -> Any:
        """Return the same access as pyarrow's file system, whose paths begin with the bucket."""
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        names = {
            "aws_access_key_id": "access_key",
            "aws_secret_access_key": "secret_key",
            "aws_session_token": "session_token",
            "region_name": "region",
            "endpoint_url": "endpoint_override",
        }
        found = {names[name]: value for name, value in self.settings}
        scheme, _, host = found.get("endpoint_override", "").rpartition("://")
        if host:
            found |= {"endpoint_override": host, "scheme": scheme or "https"}
        return S3FileSystem(
            **found, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_REQUESTS)
        )


@functools.lru_cache(maxsize=4)
def _client(access: S3Access) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    retries: Any = {"total_max_attempts": _REQUESTS, "mode": "standard"}
    config = Config(retries=retries, connect_timeout=10, read_timeout=60)
    settings: dict[str, Any] = dict(access.settings)
    return Session().client("s3", config=config, **settings)


def list_objects(source: str, access: S3Access) -> list[tuple[str, int, str]]:
    """Return (address, bytes, ETag) of the objects that ``source`` names, sorted by key.

    Args:
        source: ``s3://bucket/`` with a key, a glob (``*`` within one level, ``**`` across levels), a
            folder, or, where there is no such folder, any prefix of keys.
        access: see ``S3Access``.

    Raises:
        DataError: naming what S3 refused and what to do.
    """
    bucket, _, key = source.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{source}: names no bucket; write s3://bucket/prefix")
    fixed = re.split(r"[*?\[]", key, maxsplit=1)[0]
    found = list(_listed(source, bucket, fixed, access))
    if fixed != key:
        matches = re.compile(_glob_pattern(key)).fullmatch
        found = [item for item in found if matches(item[0])]
    else:
        folder = key.rstrip("/") + "/" if key else ""
        exact = [item for item in found if item[0] == key]
        inside = [item for item in found if item[0].startswith(folder)]
        found = exact or inside or found
    return [(f"{SCHEME}{bucket}/{name}", size, etag) for name, size, etag in sorted(found)]


def _listed(
    source: str, bucket: str, prefix: str, access: S3Access
) -> Iterator[tuple[str, int, str]]:
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

    try:
        pages = access.client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                yield item["Key"], item["Size"], item["ETag"]
    except ParamValidationError:
        raise DataError(f"{source}: {bucket!r} can't be the name of a bucket") from None
    except (BotoCoreError, ClientError, ValueError) as error:
        raise explained(source, error) from None


def _glob_pattern(key: str) -> str:
    """Return the regular expression of a glob over keys."""
    pattern = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", key):
        if token == "**/":
            pattern += "(?:.*/)?"
        elif token == "**":
            pattern += ".*"
        elif token in ("*", "?"):
            pattern += "[^/]" + token.replace("?", "")
        elif token.startswith("["):
            pattern += re.sub(r"^\[!", "[^", token.replace("\\", r"\\"))
        else:
            pattern += re.escape(token)
    return pattern


def open_object(address: str, size: int, etag: str, access: S3Access) -> BinaryIO:
    """Open an object for buffered reading; it must still have the listed ETag."""
    return io.BufferedReader(_Object(address, size, etag, access), _BUFFER)


class _Object(io.RawIOBase):
    """One object as a file that can be read from anywhere, by ranged requests."""

    def __init__(self, address: str, size: int, etag: str, access: S3Access):
        self.address, self.size, self.etag, self.access = address, size, etag, access
        self.bucket, _, self.key = address.removeprefix(SCHEME).partition("/")
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self.position)
        if count <= 0:
            return 0
        buffer[:count] = self._range(self.position, count)
        self.position += count
        return count

    def _range(self, start: int, count: int) -> bytes:
        """Fetch a range; boto3 repeats a refused request, this one a body that breaks off."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            HTTPClientError,
            IncompleteReadError,
        )

        for attempt in range(_ATTEMPTS):
            try:
                answer = self.access.client().get_object(
                    Bucket=self.bucket,
                    Key=self.key,
                    Range=f"bytes={start}-{start + count - 1}",
                    IfMatch=self.etag,
                )
                return answer["Body"].read()
            except (HTTPClientError, IncompleteReadError) as error:
                if attempt == _ATTEMPTS - 1:
                    raise explained(self.address, error) from None
            except (BotoCoreError, ClientError) as error:
                raise explained(self.address, error) from None
        raise AssertionError("unreachable")


def explained(source: str, error: Exception) -> DataError:
    """Return what S3 refused, and what to do, as one of our errors."""
    code = getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__)
    advice = _ADVICE.get(code)
    if code in ("NoCredentialsError", "PartialCredentialsError"):
        advice = "no AWS keys found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if advice is None:
        advice = f"{' '.join(str(error).split())}; check AWS_ENDPOINT_URL and the network"
    return DataError(f"{source}: can't be read from S3: {advice}")
