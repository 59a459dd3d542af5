"""Which code runs: the version, and a digest of the package's own sources."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from trace_ray import __version__


@functools.cache
def code_version() -> str:
    """Return the version and a digest of the sources, e.g. ``0.1.0+1a2b3c4d5e6f``.

    It is recorded with what was made, and is no part of a stage's key, which holds the version alone:
    with the sources in it each release, and each edited comment, would do all work again.
    """
    root, total = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {digest}\n".encode())
    return f"{__version__}+{total.hexdigest()[:12]}"
