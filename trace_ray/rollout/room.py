"""Whether the cluster can ever hold what a config asks for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trace_ray.config import FleetConfig, Resources
from trace_ray.config.oracle import VLLMOracle
from trace_ray.errors import ConfigError
from trace_ray.rollout.estimate import GIB
from trace_ray.runtime.cluster import alive_nodes, may_grow

_ROUNDING = 1e-6
"""Ray counts resources in steps of 1e-4."""


def no_room(resources: Resources, copies: int = 1) -> str:
    """Say why the cluster can never hold a worker; empty where it can, or where it may still grow.

    Where nodes may be added, what doesn't fit now is only a warning, on stderr.

    Args:
        resources: of a worker.
        copies: workers that run at once.
    """
    why = lacking(resources, copies, alive_nodes())
    if why and may_grow():
        print(f"warning: {why}; it waits for the autoscaler to add such a node", file=sys.stderr)
        return ""
    return why


def lacking(resources: Resources, copies: int, nodes: Sequence[dict[str, float]]) -> str:
    """Say why these nodes can't hold so many workers at once; empty where they can.

    Args:
        resources: of a worker.
        copies: workers that run at once.
        nodes: by node, its resources as Ray names them (memory in bytes).
    """
    bundle = resources.bundle
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in bundle}
    over = [
        f"{_shown(name, wanted)} asked for, the largest node has {_shown(name, largest[name])}"
        for name, wanted in bundle.items()
        if wanted > largest[name]
    ]
    if over:
        return "; ".join(over)
    room = sum(
        min(int(node.get(name, 0.0) / wanted + _ROUNDING) for name, wanted in bundle.items())
        for node in nodes
    )
    if room >= copies:
        return ""
    asked = ", ".join(_shown(name, wanted) for name, wanted in bundle.items())
    return f"{copies} x ({asked}) asked for at once, all {len(nodes)} nodes have room for {room}"


def _shown(name: str, amount: float) -> str:
    return f"{amount / GIB:.1f} GiB memory" if name == "memory" else f"{amount:g} {name}"


def require_room(config: FleetConfig) -> None:
    """Refuse judges and an oracle that the cluster can never hold.

    Raises:
        ConfigError: naming each section, with the numbers.
    """
    asked = {where: judge.actor_resources for where, judge in config.judges.items()}
    if isinstance(config.oracle, VLLMOracle):
        asked["oracle"] = config.oracle.resources
    found = [f"{where}.resources: {why}" for where, each in asked.items() if (why := no_room(each))]
    if found:
        raise ConfigError("\n".join(found))
