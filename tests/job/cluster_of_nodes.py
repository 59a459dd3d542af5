"""A Ray cluster of separate nodes on one machine: a head without CPUs, and workers that share no disk.

Each worker runs in a mount namespace of its own in which the folder of the storage's copy is empty.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray.util
from ray._common.utils import get_ray_address_file

BIN = Path(sys.executable).parent
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def can_unshare():
    done = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return done.returncode == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(argv, log, **env):
    """A process in a session of its own, ended with all its children."""
    with log.open("w") as file:
        started = subprocess.Popen(
            argv, stdout=file, stderr=file, env=os.environ | env, start_new_session=True
        )
    try:
        yield started
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(timeout=15)


def kill(started):
    """SIGKILL a process with everything it started: Ray's would take their time to end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [psutil.Process(started.pid), *psutil.Process(started.pid).children(True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def wait_until(ready, limit_s=180):
    limit = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.3)


def forget(port):
    """Remove the note of a cluster that is gone: Ray's tools would look for it there."""
    note = Path(get_ray_address_file(None))
    if note.exists() and note.read_text().strip().endswith(f":{port}"):
        note.unlink()


class Nodes:
    """The workers of a cluster, and the environment of a driver on its head."""

    def __init__(self, folder, start, hidden, env, running):
        self.folder, self.start, self.hidden, self.running = folder, start, hidden, running
        self.env = env
        self.up = []

    def add(self):
        """Start a worker and wait for it: two that start at once get in each other's way."""
        log = self.folder / f"worker-{len(list(self.folder.glob('worker-*')))}.log"
        hide = f"mount -t tmpfs none {self.hidden} && exec "
        argv = [*NAMESPACE, "sh", "-c", hide + " ".join(self.start)]
        self.up.append(self.running.enter_context(process(argv, log, **self.env)))
        wait_until(lambda: "Ray runtime started" in log.read_text())

    def kill(self, which):
        """SIGKILL a worker with everything on it."""
        kill(self.up.pop(which))


@contextlib.contextmanager
def cluster(folder, workers=2, cpus=2):
    """Yield the nodes; the folder of the driver's storage copies is empty in each worker."""
    cache = folder / "cache"
    cache.mkdir()
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    start = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
    start += ["--object-store-memory=500000000"]
    head = [*start, "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    worker = [*start, f"--address={address}", f"--num-cpus={cpus}"]
    with contextlib.ExitStack() as running:
        running.callback(forget, port)
        # The paths of sockets have to be short.
        sessions = running.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        head.append(f"--temp-dir={sessions}")
        log = folder / "head.log"
        first = running.enter_context(process(head, log, **env))
        wait_until(lambda: "Ray runtime started" in log.read_text())
        env |= {"RAY_ADDRESS": address, "TRACE_RAY_CACHE": str(cache)}
        nodes = Nodes(folder, worker, cache, env, running)
        for _ in range(workers):
            nodes.add()
        yield nodes
        for each in (*nodes.up, first):
            kill(each)
