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


def wait_until(ready, limit_s=60):
    limit = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.3)


def forget(address):
    """Remove the note of a cluster that is gone: Ray's tools would look for it there."""
    note = Path(get_ray_address_file(None))
    if note.exists() and note.read_text().strip() == address:
        note.unlink()


@contextlib.contextmanager
def cluster(folder, cache, workers=2, cpus=2):
    """Yield a driver's environment and the workers' processes; ``cache`` is empty in each worker."""
    cache.mkdir()
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    start = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
    start += ["--object-store-memory=500000000"]
    head = [*start, "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    hide = f"mount -t tmpfs none {cache} && exec "
    with contextlib.ExitStack() as running:
        running.callback(forget, address)
        # The paths of sockets have to be short.
        sessions = running.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        head.append(f"--temp-dir={sessions}")
        running.enter_context(process(head, folder / "head.log", **env))
        wait_until(lambda: "Ray runtime started" in (folder / "head.log").read_text())
        nodes = []
        for number in range(workers):
            node = [*start, f"--address={address}", f"--num-cpus={cpus}"]
            argv = [*NAMESPACE, "sh", "-c", hide + " ".join(node)]
            log = folder / f"worker-{number}.log"
            nodes.append(running.enter_context(process(argv, log, **env)))
            wait_until(lambda log=log: "Ray runtime started" in log.read_text())
        yield env | {"RAY_ADDRESS": address, "TRACE_RAY_CACHE": str(cache)}, nodes
