"""Aliases of registered models, and the mark of those that were champion.

The caller keeps other writers out and says what failed: see ``registry.Registry``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trace_ray.core.promotion import CHALLENGER, CHAMPION, AliasMove
from trace_ray.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

WAS_CHAMPION = "was_champion"
"""Tag of a version that is or was champion: a rollback may go back to it."""


class Aliases:
    """The aliases in one MLflow registry; ``name`` is always a registered model's full name."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def of(self, name: str) -> dict[str, str]:
        """Return each alias of a model and the version it points at."""
        found = self._client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in found.items()}

    def point(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version, wherever it points now."""
        self._client.set_registered_model_alias(name, alias, str(version))

    def move(self, name: str, move: AliasMove) -> None:
        """Do one planned move; twice is once.

        Raises:
            RegistryError: the alias was moved elsewhere since the move was planned.
        """
        now = self.of(name).get(move.alias)
        at = None if now is None else int(now)
        if move.after is None:
            if at is not None and at == move.before:
                self._client.delete_registered_model_alias(name, move.alias)
            return
        if at not in (move.before, move.after):
            raise RegistryError(
                f"{name}@{move.alias} points at version {at or 'none'}, not "
                f"{move.before or 'none'} as when the move to {move.after} was planned: somebody "
                "moved it by hand; point it back, then repeat the command"
            )
        if move.alias == CHAMPION:
            for version in filter(None, (move.before, move.after)):
                self._mark_champion(name, version)
        self.point(name, move.alias, move.after)

    def give(self, name: str, version: int, alias: str) -> None:
        """Give a version that was just registered its alias, without taking the champion's place."""
        if not alias:
            return
        champion = self.of(name).get(CHAMPION)
        if alias == CHALLENGER and champion == str(version):
            return
        if alias == CHAMPION:
            if champion not in (None, str(version)):
                alias = CHALLENGER
            else:
                self._mark_champion(name, version)
        self.point(name, alias, version)

    def _mark_champion(self, name: str, version: int) -> None:
        self._client.set_model_version_tag(name, str(version), WAS_CHAMPION, "true")
