"""Where a process runs, as far as another one has to know to look at it by its number."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path


def pid_space() -> str:
    """Return within what process numbers mean the same here: this boot, this pid namespace.

    Two containers, and two machines, may have one hostname. Empty where /proc doesn't tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_here(host: str, space: str) -> bool:
    """Whether a process of that hostname and ``pid_space`` can be looked at from this one."""
    return host == socket.gethostname() and space == pid_space()


def host_mark() -> str:
    """Return a part of a file name that only processes have which can look at each other."""
    host, space = socket.gethostname(), pid_space()
    return f"{host}.{hashlib.sha256(space.encode()).hexdigest()[:8]}" if space else host
