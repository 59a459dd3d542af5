"""What is registered with an adapter, and what the registry gives back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_ray.errors import ModelError
from trace_ray.models.adapters import adapter_sha256, check_adapter, read_base_digest


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """Everything that is registered with a trained adapter."""

    name: str
    """The model's name in the fleet; the registered model is ``<prefix>-<name>``."""
    adapter_dir: Path
    adapter_id: str
    adapter_sha256: str
    policy_id: str
    policy_version: str
    policy_digest: str
    data_digest: str
    base: str
    base_revision: str
    base_digest: str
    parent_adapter: str
    """Adapter id it started from; empty when it started from the base."""
    objective: str
    alias: str
    """Alias set on the version; empty sets none."""
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Final numbers, tied to the model."""
    history: Sequence[Mapping[str, float]] = ()
    """Training log: rows of ``{step, timestamp_ms, <metric>: value}``."""
    artifacts: Sequence[Path] = ()
    """Files or folders kept with the run."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """More digests of what it was made from, by name."""
    card: str = ""
    """JSON of what is known of a judge; empty for other adapters."""

    def tags(self) -> dict[str, str]:
        """Return the version's lineage tags."""
        names = (
            "policy_id policy_version policy_digest data_digest base base_revision base_digest "
            "adapter_id adapter_sha256 parent_adapter objective"
        )
        found = {name: str(getattr(self, name)) for name in names.split()}
        return found | dict(self.made_from) | ({"card": self.card} if self.card else {})


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version of a registered model, as the registry holds it now."""

    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    created_ms: int
    reused: bool = False
    """True where ``register`` found it there already."""

    @property
    def registered_as(self) -> str:
        """``name/version``."""
        return f"{self.name}/{self.version}"

    @property
    def reference(self) -> str:
        """``models:/name/version``, for a config or ``Registry.resolve``."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class DeployedAdapter:
    """An adapter on this machine, checked against what was registered."""

    path: Path
    adapter_id: str
    sha256: str
    base_digest: str | None
    """None for a directory that doesn't say which base it belongs to."""
    registered_as: str
    """``name/version``; empty for a directory."""
    tags: Mapping[str, str]

    @property
    def policy(self) -> str:
        """Id and version of the policy it was realigned under; empty where no tag says so."""
        return " ".join(filter(None, (self.tags.get("policy_id"), self.tags.get("policy_version"))))


def deployed_from_directory(reference: str) -> DeployedAdapter:
    """Return the adapter in a directory, checked.

    Raises:
        ModelError: no such directory, or no usable adapter in it.
    """
    path = Path(reference).expanduser().absolute()
    if not path.is_dir():
        raise ModelError(
            f"{reference}: no such adapter directory; write a directory, models:/name@alias or "
            "models:/name/3"
        )
    check_adapter(path)
    sha256 = adapter_sha256(path)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name)
    return DeployedAdapter(path, f"{name}-{sha256[:8]}", sha256, read_base_digest(path), "", {})
