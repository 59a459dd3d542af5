"""The names an endpoint answers to at one moment: replaced as a whole, never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trace_ray.core.promotion import CHALLENGER
from trace_ray.core.split import Split, goes_to_candidate
from trace_ray.serve.config import Route, ServedModel, routes_of


@dataclass(frozen=True, slots=True)
class NameTable:
    """Models, the names that lead to their adapters, and whose traffic is split."""

    models: tuple[ServedModel, ...] = ()
    splits: Mapping[str, Split] = field(default_factory=dict)
    """Model -> how requests to its bare name are divided."""
    routes: Mapping[str, Route] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Sequence[ServedModel], splits: Mapping[str, Split]) -> NameTable:
        """Return the table of these models.

        Raises:
            ConfigError: a model's ``default`` names an alias that no adapter has.
        """
        return cls(tuple(models), dict(splits), routes_of(models))

    def split_of(self, route: Route) -> Split | None:
        """Return how a name's requests are divided; None where they are not.

        Only a bare name is divided, and only while both sides are what the rollout compares: a
        promotion or a withdrawal ends the split with the alias it moves.
        """
        split = self.splits.get(route.name)
        if split is None or route.adapter_id != split.champion:
            return None
        challenger = self.routes.get(f"{route.model}@{CHALLENGER}")
        if challenger is None or challenger.adapter_id != split.candidate:
            return None
        return split

    def answerer(self, route: Route, key: str) -> Route:
        """Return the route of one request: the name's own, or its candidate's under that name."""
        split = self.split_of(route)
        if split is None or not goes_to_candidate(split, route.model, key):
            return route
        return self.routes[split.candidate].model_copy(update={"name": route.name})
