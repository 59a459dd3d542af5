"""Adapters in MLflow: one run and one immutable model version each, aliases to point at them.

A version holds the adapter alone (a few MB), through MLflow's LoggedModel. Registering the same
adapter for the same policy again finds the version that is there. What is read back is compared
with the sha256 it was registered under. Everything goes through a client with its own address, so
no global state of MLflow is touched.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trace_ray.core.promotion import AliasMove
from trace_ray.errors import RegistryError
from trace_ray.locks import locked
from trace_ray.models.adapters import CONFIG, WEIGHTS, adapter_sha256, write_meta
from trace_ray.models.fingerprint import FINGERPRINT
from trace_ray.runtime.adapter_cache import fetch_adapter
from trace_ray.runtime.aliases import Aliases
from trace_ray.runtime.mlflow_client import (
    first_line,
    open_client,
    require_answer,
    shown,
    sqlite_file,
    sqlite_uri,
    told,
)
from trace_ray.runtime.records import (
    AdapterRecord,
    DeployedAdapter,
    RegisteredVersion,
    deployed_from_directory,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100
_NO_ROW_KEYS = ("step", "timestamp_ms")


def default_uri(storage: Path) -> str:
    """Return the embedded registry's address: sqlite in the storage folder."""
    return sqlite_uri(Path(storage).absolute() / "mlflow.db")


class Registry:
    """One MLflow server or sqlite file, seen as a registry of adapters."""

    def __init__(self, uri: str, prefix: str = "trace", experiment: str = "trace-ray") -> None:
        """Connect; a sqlite file, its folder and the experiment are made where they are missing.

        Args:
            uri: MLflow tracking and registry address.
            prefix: registered models are called ``<prefix>-<model name>``.
            experiment: MLflow experiment of the runs.

        Raises:
            RegistryError: nothing answers there.
        """
        self.uri = uri
        self.prefix = prefix
        file = sqlite_file(uri)
        self._file = file and file.absolute()
        if self._file is not None:
            _, sign, options = uri.partition("?")
            self.uri = f"{sqlite_uri(self._file)}{sign}{options}"
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RegistryError(f"{uri}: its folder can't be made: {error.strerror}") from None
        elif uri.startswith(("http://", "https://")):
            require_answer(uri)
        with told(self.uri, "can't be opened"), self._exclusive():
            self._client = open_client(self.uri)
            self._named = Aliases(self._client)
            self._experiment_id = self._experiment(experiment)

    def registered_name(self, model: str) -> str:
        """Return the registered model's name of a model of the fleet."""
        return f"{self.prefix}-{model}"

    def register(self, record: AdapterRecord) -> RegisteredVersion:
        """Register an adapter and point ``record.alias`` at it; once only per adapter and policy.

        Only a first champion is made so: where another version is champion, the new one becomes
        ``challenger``, and ``trace-ray rollout promote`` decides. A champion stays without that name.

        Raises:
            RegistryError: MLflow refuses, or the folder holds another adapter than recorded.
        """
        sha256 = adapter_sha256(record.adapter_dir)
        if sha256 != record.adapter_sha256:
            raise RegistryError(
                f"{record.adapter_dir}: holds adapter {sha256[:8]}, but "
                f"{record.adapter_sha256[:8]} was recorded; it changed since it was trained"
            )
        name = self.registered_name(record.name)
        with told(self.uri, f"{name} can't be registered"), self._exclusive():
            found = self._existing(name, record)
            version = int((found or self._create(name, record)).version)
            self._named.give(name, version, record.alias)
            made = self._version(name, self._client.get_model_version(name, str(version)))
        return replace(made, reused=found is not None)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias of a registered model (its full name) at a version."""
        with told(self.uri, f"alias {name}@{alias} can't be set"), self._exclusive():
            self._named.point(name, alias, version)

    def move_alias(self, name: str, move: AliasMove) -> None:
        """Do one planned move of an alias of a registered model (its full name); twice is once.

        A new champion's version is marked as one that was champion, before it is.

        Raises:
            RegistryError: MLflow refuses, or the alias was moved elsewhere since it was planned.
        """
        with told(self.uri, f"alias {name}@{move.alias} can't be moved"), self._exclusive():
            self._named.move(name, move)

    def log_artifact(self, registered_as: str, path: Path) -> None:
        """Keep a file with the run of a version (``name/version``); of one name, the last stays."""
        name, _, version = registered_as.rpartition("/")
        with told(self.uri, f"{path} can't be kept with {registered_as}"):
            run_id = self._client.get_model_version(name, version).run_id
            self._client.log_artifact(str(run_id), str(path))

    def log_run(
        self,
        name: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        step: int = 0,
        *,
        ended: bool = True,
    ) -> None:
        """Log the metrics of a ``step`` to a run that makes no adapter, such as a triage.

        The first call under a ``name`` begins the run, the one with ``ended`` closes it.

        Raises:
            RegistryError: MLflow refuses.
        """
        with told(self.uri, f"metrics of {name} can't be logged"), self._exclusive():
            found = self._client.search_runs(
                [self._experiment_id], f"attributes.run_name = '{name}'", max_results=1
            )
            run = found[0] if found else None
            if run is None:
                run = self._client.create_run(self._experiment_id, run_name=name, tags=dict(tags))
            for key, value in metrics.items():
                self._client.log_metric(run.info.run_id, key, float(value), step=step)
            if ended:
                self._client.set_terminated(run.info.run_id)

    def versions(self, name: str) -> list[RegisteredVersion]:
        """Return all versions of a registered model (its full name), oldest first, with aliases.

        Raises:
            RegistryError: MLflow can't be read; a name nobody registered is an empty list.
        """
        with told(self.uri, f"{name} can't be listed"):
            found = self._search(name)
            aliases = self._named.of(name) if found else {}
            return [self._version(name, each, aliases) for each in found]

    def resolve(self, reference: str, cache: Path) -> DeployedAdapter:
        """Return an adapter's files on this machine, checked.

        Args:
            reference: ``models:/name@alias``, ``models:/name/3`` or a directory.
            cache: folder that downloads go to, one sub-folder per adapter.

        Raises:
            RegistryError: no such model, alias or version, or its files aren't what was registered.
            ModelError: a directory that holds no usable adapter.
        """
        if not reference.startswith("models:"):
            return deployed_from_directory(reference)
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise RegistryError(f"{reference}: write models:/name@alias or models:/name/3")
        found = self._find(reference, match["name"], match["alias"], match["version"])
        tags = dict(found.tags or {})
        sha256 = tags.get("adapter_sha256")
        if not sha256:
            raise RegistryError(
                f"{reference}: has no tag adapter_sha256; it wasn't registered here"
            )
        path = fetch_adapter(self._client, self.uri, found, sha256, Path(cache))
        return DeployedAdapter(
            path,
            tags.get("adapter_id") or f"{found.name}-v{found.version}",
            sha256,
            tags.get("base_digest") or None,
            f"{found.name}/{found.version}",
            tags,
        )

    def run_link(self, run_id: str) -> str:
        """Return where a run is seen: a page of the server, or the run's id in a sqlite file."""
        if self._file is not None:
            return f"{self.uri} run {run_id}"
        return f"{shown(self.uri)}/#/experiments/{self._experiment_id}/runs/{run_id}"

    def _find(
        self, reference: str, name: str, alias: str | None, version: str | None
    ) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        try:
            if alias is not None:
                return self._client.get_model_version_by_alias(name, alias)
            return self._client.get_model_version(name, str(version))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                text = f"{self.uri}: {reference}: {first_line(error)}"
                raise RegistryError(shown(text)) from None
            known = self.versions(name)
            if not known:
                hint = f"nobody registered {name} there; run `trace-ray apply` for it first"
            elif alias is not None:
                given = sorted({each for item in known for each in item.aliases})
                hint = f"{name} has no alias {alias!r}; it has {', '.join(given) or 'none'}"
            else:
                hint = f"{name} has versions {', '.join(str(item.version) for item in known)}"
            raise RegistryError(f"{reference}: not in {shown(self.uri)}: {hint}") from None

    def _existing(self, name: str, record: AdapterRecord) -> ModelVersion | None:
        wanted = (record.adapter_sha256, record.policy_digest)
        for found in self._search(name):
            tags = found.tags or {}
            if (tags.get("adapter_sha256"), tags.get("policy_digest")) == wanted:
                return found
        return None

    def _create(self, name: str, record: AdapterRecord) -> ModelVersion:
        """Make the run, its model and the version; a run that fails on the way is marked so."""
        from mlflow.exceptions import MlflowException

        client = self._client
        run = client.create_run(self._experiment_id, run_name=record.adapter_id, tags=record.tags())
        run_id = run.info.run_id
        try:
            self._log(run_id, record)
            model_id, source = self._log_model(run_id, record)
            with contextlib.suppress(MlflowException):  # there since an earlier version
                client.create_registered_model(name)
            version = client.create_model_version(
                name,
                source=source,
                run_id=run_id,
                tags=record.tags(),
                model_id=model_id,
            )
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
        return version

    def _log(self, run_id: str, record: AdapterRecord) -> None:
        from mlflow.entities import Metric, Param

        params = [Param(key, str(value)) for key, value in record.params.items()]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), int(row.get("timestamp_ms", now)), int(row.get("step", 0)))
            for row in record.history
            for key, value in row.items()
            if key not in _NO_ROW_KEYS
        ]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_CALL])
        for path in map(Path, record.artifacts):
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), path.name)
            else:
                self._client.log_artifact(run_id, str(path))

    def _log_model(self, run_id: str, record: AdapterRecord) -> tuple[str, str]:
        """Store the adapter's files as a LoggedModel; return its id and the version's source."""
        client = self._client
        model = client.create_logged_model(
            self._experiment_id,
            name=re.sub(r"[^A-Za-z0-9_-]+", "-", record.name),
            source_run_id=run_id,
            tags=record.tags(),
            model_type="lora",
        )
        with tempfile.TemporaryDirectory() as draft:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(Path(record.adapter_dir, name), Path(draft, name))
            write_meta(draft, record.base_digest)
            if (fingerprint := Path(record.adapter_dir, FINGERPRINT)).exists():
                shutil.copyfile(fingerprint, Path(draft, FINGERPRINT))
            client.log_model_artifacts(model.model_id, draft)
        client.finalize_logged_model(model.model_id, "READY")
        for key, value in record.metrics.items():
            client.log_metric(run_id, key, float(value), model_id=model.model_id)
        # A database opened directly looks ``models:/`` up in MLflow's global store: name the files.
        served = self.uri.startswith(("http://", "https://"))
        return model.model_id, f"models:/{model.model_id}" if served else model.artifact_location

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        folder = self._file.parent / "mlartifacts" if self._file else None
        location = folder.as_uri() if folder else None
        return self._client.create_experiment(name, artifact_location=location)

    def _search(self, name: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name='{name}'", page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda each: int(each.version))

    def _version(
        self, name: str, found: ModelVersion, aliases: Mapping[str, str] | None = None
    ) -> RegisteredVersion:
        aliases = self._named.of(name) if aliases is None else aliases
        mine = sorted(alias for alias, at in aliases.items() if str(at) == str(found.version))
        return RegisteredVersion(
            name,
            int(found.version),
            found.run_id or "",
            tuple(mine),
            dict(found.tags or {}),
            int(found.creation_timestamp or 0),
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other writers out of a sqlite file: they'd meet in its migrations and its locks."""
        if self._file is None:
            yield
            return
        with locked(self._file.with_suffix(".lock")):
            yield
