"""Registered adapters' files on this machine: downloaded once, never taken for what they are not."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from trace_ray.errors import ModelError, RegistryError
from trace_ray.models.adapters import adapter_sha256
from trace_ray.runtime.mlflow_client import told

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def fetch_adapter(
    client: MlflowClient, uri: str, version: ModelVersion, sha256: str, cache: Path
) -> Path:
    """Return a version's folder in the cache, filled by one rename; a damaged one is replaced.

    Args:
        client: of the registry.
        uri: the registry's address.
        version: in the registry.
        sha256: of the adapter, as it was registered.
        cache: folder of the downloads, a sub-folder for each adapter.

    Raises:
        RegistryError: the files can't be had, or aren't what was registered.
    """
    from mlflow.artifacts import download_artifacts

    name = f"models:/{version.name}/{version.version}"
    final = cache / sha256[:16]
    if final.exists():
        with contextlib.suppress(ModelError):
            if adapter_sha256(final) == sha256:
                return final
    draft = cache / f".{sha256[:16]}.tmp-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    draft.mkdir(parents=True)
    try:
        with told(uri, f"{name} can't be downloaded"):
            downloaded = download_artifacts(
                artifact_uri=_location(client, version),
                dst_path=str(draft),
                tracking_uri=uri,
                registry_uri=uri,
            )
        _require_sha256(name, Path(downloaded), sha256)
        if final.exists():
            final.rename(draft / "damaged")
            shutil.rmtree(draft / "damaged")
        Path(downloaded).rename(final)
    except OSError:
        # Another process published the same adapter first.
        _require_sha256(name, final, sha256)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _location(client: MlflowClient, version: ModelVersion) -> str:
    """Where a version's files are; asked by id, not through MLflow's global registry."""
    if version.model_id:
        return client.get_logged_model(version.model_id).artifact_location
    return client.get_model_version_download_uri(version.name, version.version)


def _require_sha256(name: str, folder: Path, sha256: str) -> None:
    try:
        found = adapter_sha256(folder)
    except ModelError as error:
        raise RegistryError(f"{name}: its artifacts are incomplete: {error}") from None
    if found != sha256:
        raise RegistryError(
            f"{name}: its files are adapter {found[:8]}, but {sha256[:8]} was registered; "
            "someone changed them in the artifact store: do not use this version, register again"
        )
