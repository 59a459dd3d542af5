"""Who is champion: promotion by the gate's word, rollback by one command, both journaled.

A change is planned for all its models first and refused as a whole, in words. Then it is written
to the journal, its alias moves are made, its audit record is added, and the journal is cleared. A
process killed at any of these steps leaves the rest to the next command, or to the endpoint that
starts: nobody reads a fleet that is promoted in part.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_ray.config import FleetConfig, load_config
from trace_ray.core.gates import GateVerdict
from trace_ray.core.promotion import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    AliasMove,
    promotion_moves,
    rollback_moves,
)
from trace_ray.errors import ConfigError, RolloutError
from trace_ray.rollout.plan import open_registry
from trace_ray.runtime.aliases import WAS_CHAMPION
from trace_ray.runtime.audit_log import audit_of, user
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.journal import Journal, rollout_files
from trace_ray.runtime.records import RegisteredVersion
from trace_ray.runtime.registry import Registry

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model of the fleet, as the registry holds it."""

    name: str
    registered: str
    versions: tuple[RegisteredVersion, ...]
    gates: dict[str, dict[str, Any] | None]
    """``name/version`` -> the gate's decision, out of the audit chain; None = not measured."""

    @property
    def aliases(self) -> dict[str, int]:
        """Alias -> version."""
        return {alias: each.version for each in self.versions for alias in each.aliases}

    def at(self, alias: str) -> RegisteredVersion | None:
        """Return the version an alias points at."""
        return next((each for each in self.versions if alias in each.aliases), None)

    def version(self, number: int) -> RegisteredVersion:
        """Return a version by its number."""
        return next(each for each in self.versions if each.version == number)


class Rollouts:
    """Promotion and rollback in one fleet."""

    def __init__(self, config_path: str) -> None:
        """Open a fleet's registry, audit chain and journal.

        Raises:
            ConfigError: the config.
            RegistryError: the registry can't be reached.
            RolloutError: an earlier version left a rollout's state for the whole storage.
        """
        self.source = config_path
        self.config: FleetConfig = load_config(config_path)
        self.registry: Registry = open_registry(self.config)
        self.audit = audit_of(self.config)
        bucket, prefix = Bucket.of(self.config), self.config.tracking.registry_prefix
        self.files = rollout_files(self.config.storage, bucket, prefix)
        """Of the rollout: its journal, its state, the operators' locks."""
        self.journal = Journal(self.files)

    def promote(
        self,
        names: Sequence[str] = (),
        force: str = "",
        evidence: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Make each model's challenger its champion and return the change; None where nothing moves.

        A promotion that was cut short is finished instead, and returned.

        Args:
            names: models; empty = every model that has a challenger.
            force: why a model is promoted that the gate did not let through; kept in the audit chain.
            evidence: of live traffic (``core.waves.live_evidence``); kept in the audit chain.

        Raises:
            RolloutError: the gate did not say promote for each of them, or another operator is at
                work; nothing was moved.
        """
        with self.journal.locked(user()):
            if (cut_short := self._finish()) and cut_short["what"] == "promote":
                return cut_short
            states = self.states(names)
            chosen = [state for state in states if names or state.at(CHALLENGER)]
            refused = [text for state in chosen for text in not_promotable(state, force)]
            if refused:
                raise RolloutError("\n".join(refused))
            moves = [
                (state, promotion_moves(state.aliases, state.aliases[CHALLENGER]))
                for state in chosen
            ]
            return self._change("promote", moves, force, evidence)

    def rollback(
        self,
        names: Sequence[str] = (),
        to_policy: str | None = None,
        force: str = "",
        evidence: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Bring an earlier champion back and return the change; None where nothing moves.

        Args:
            names: models; empty = the whole fleet.
            to_policy: policy version whose champion comes back; None = the ``previous`` champion of
                each model that has one.
            force: why a version comes back that never was champion.
            evidence: of live traffic (``core.drops.drop_evidence``); kept in the audit chain.

        Raises:
            RolloutError: a model has nothing to go back to; nothing was moved.
        """
        with self.journal.locked(user()):
            if (cut_short := self._finish()) and cut_short["what"] == "rollback":
                return cut_short
            states = self.states(names)
            if to_policy is None and not names:
                states = [state for state in states if state.at(PREVIOUS)]
            refused, moves = [], []
            for state in states:
                try:
                    target = _rollback_target(state, to_policy, force)
                    moves.append((state, rollback_moves(state.aliases, target)))
                except RolloutError as error:
                    refused.append(str(error))
            if refused:
                raise RolloutError("\n".join(refused))
            return self._change("rollback", moves, force, evidence)

    def withdraw(
        self, name: str, reason: str, evidence: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Take a model's challenger out of the running; its champion stays. None where it has none.

        ``evidence`` is kept in the audit chain, as that of a promotion.
        """
        with self.journal.locked(user()):
            self._finish()
            (state,) = self.states([name])
            candidate = state.at(CHALLENGER)
            if candidate is None:
                return None
            moves = [AliasMove(CHALLENGER, candidate.version, None)]
            return self._change("withdraw", [(state, moves)], reason, evidence)

    def finish(self) -> dict[str, Any] | None:
        """Do the rest of a change that was cut short and return it; None where there is none."""
        if self.journal.pending() is None:
            return None
        with self.journal.locked(user()):
            return self._finish()

    def record(
        self, what: str, evidence: Mapping[str, Any], inputs: Mapping[str, str] | None = None
    ) -> None:
        """Add a record to the audit chain; what it tells already is not told twice."""
        plain = json.loads(json.dumps(evidence))
        known = [(record.what, record.evidence) for record in self.audit.records()]
        if (what, plain) not in known:
            self.audit.append(what, inputs or {}, plain)

    def states(self, names: Sequence[str] = ()) -> list[ModelState]:
        """Return the models of the fleet as the registry holds them.

        Raises:
            ConfigError: a name that the fleet doesn't have.
        """
        known = [model.name for model in self.config.models]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ConfigError(
                f"{self.source}: no model is called {', '.join(unknown)}; it has {', '.join(known)}"
            )
        gates: dict[str, dict[str, Any] | None] = {}
        for record in self.audit.records():
            if record.what == "realign":
                gates |= {row["registered_as"]: row["gate"] for row in record.evidence["models"]}
        found = []
        for name in [each for each in known if not names or each in names]:
            registered = self.registry.registered_name(name)
            versions = tuple(self.registry.versions(registered))
            found.append(ModelState(name, registered, versions, gates))
        return found

    def _change(
        self,
        what: str,
        moves: list[tuple[ModelState, list[AliasMove]]],
        force: str,
        live: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        rows = [_model_row(state, planned) for state, planned in moves if planned]
        if not rows:
            return None
        change = {"id": uuid.uuid4().hex, "what": what, "who": user(), "forced": force or None}
        change |= {"live": dict(live)} if live else {}
        self.journal.begin(change | {"models": rows})
        return self._finish()

    def _finish(self) -> dict[str, Any] | None:
        """Do whatever of the journaled change is not done; every step may be done twice."""
        change = self.journal.pending()
        if change is None:
            return None
        for row in change["models"]:
            for move in map(AliasMove.from_row, row["moves"]):
                self.registry.move_alias(row["registered"], move)
        if not any(record.evidence.get("id") == change["id"] for record in self.audit.records()):
            inputs = {f"adapter:{row['name']}": row["adapter_sha256"] for row in change["models"]}
            evidence = {
                key: change[key] for key in ("id", "forced", "models", "live") if key in change
            }
            self.audit.append(change["what"], inputs, evidence, change["who"])
        self.journal.done()
        return change


def not_promotable(state: ModelState, force: str) -> list[str]:
    """Return why a model's challenger may not be promoted; [] where it may."""
    candidate = state.at(CHALLENGER)
    if candidate is None:
        return [f"{state.name}: has no challenger; run 'trace-ray apply' first"]
    if force or state.at(CHAMPION) == candidate:
        return []
    said = f"{state.name}: {candidate.tags.get('adapter_id', candidate.registered_as)}"
    advice = "--force REASON promotes it nevertheless and keeps the reason"
    champion = state.at(CHAMPION)
    if champion is not None and not _compared_with(candidate, champion):
        against = candidate.tags.get("parent_adapter") or "the base"
        return [
            f"{said}: was measured against {against}, but the champion is "
            f"{champion.tags.get('adapter_id')}; apply again with adapter: "
            f"models:/{state.registered}@{CHAMPION} for this model; {advice}"
        ]
    if candidate.registered_as not in state.gates:
        return [f"{said}: the audit chain holds no gate decision on it; {advice}"]
    gate = state.gates[candidate.registered_as]
    if gate is None:
        return [f"{said}: was not measured; add an 'evaluation' section and apply; or {advice}"]
    if gate["verdict"] == GateVerdict.PROMOTE:
        return []
    return [f"{said}: the gate says {gate['verdict']} ({'; '.join(gate['reasons'])}); {advice}"]


def _compared_with(candidate: RegisteredVersion, champion: RegisteredVersion) -> bool:
    """Return whether a candidate was made from, and so measured against, this champion.

    An adapter that was deployed as a folder has an id of its own: its digest's start is the same.
    """
    parent = candidate.tags.get("parent_adapter", "")
    digest = champion.tags.get("adapter_sha256", "")[:8]
    return parent == champion.tags.get("adapter_id") or parent.rpartition("-")[2] == digest != ""


def _rollback_target(state: ModelState, to_policy: str | None, force: str) -> int:
    """Return the version to bring back."""
    if to_policy is None:
        previous = state.at(PREVIOUS)
        if previous is None:
            raise RolloutError(
                f"{state.name}: has no previous champion; name a policy version with --to-policy"
            )
        return previous.version
    of_policy = [v for v in state.versions if v.tags.get("policy_version") == to_policy]
    was = [v for v in of_policy if force or WAS_CHAMPION in v.tags or PREVIOUS in v.aliases]
    if was:
        return was[-1].version
    if of_policy:
        raise RolloutError(
            f"{state.name}: no version for policy {to_policy} was ever champion; promote one, or "
            "give --force REASON"
        )
    known = sorted({v.tags.get("policy_version", "?") for v in state.versions})
    raise RolloutError(
        f"{state.name}: has no version for policy {to_policy}; it has {', '.join(known) or 'none'}"
    )


def _model_row(state: ModelState, moves: list[AliasMove]) -> dict[str, Any]:
    """Return one model's part of a change; a withdrawal names the challenger, and no champion after."""
    wanted = CHAMPION if any(move.alias == CHAMPION for move in moves) else CHALLENGER
    (main,) = (move for move in moves if move.alias == wanted)
    before = None if main.before is None else state.version(main.before)
    after = before if main.after is None else state.version(main.after)
    if after is None:
        raise ValueError("a change that begins and ends with no version")
    return {
        "name": state.name,
        "registered": state.registered,
        "before": before and before.tags.get("adapter_id"),
        "after": after.tags.get("adapter_id"),
        "adapter_sha256": after.tags.get("adapter_sha256", ""),
        "policy_version": after.tags.get("policy_version"),
        "gate": (state.gates.get(after.registered_as) or {}).get("verdict"),
        "moves": [move.to_row() for move in moves],
    }


def status_table(states: Sequence[ModelState]) -> Table:
    """Return who is champion, challenger and previous, and what the gate said."""
    from rich.table import Table

    table = Table()
    for column in ("model", CHAMPION, CHALLENGER, "gate", PREVIOUS):
        table.add_column(column)
    for state in states:
        named = {alias: state.at(alias) for alias in (CHAMPION, CHALLENGER, PREVIOUS)}
        shown = {
            alias: "-" if each is None else each.tags.get("adapter_id") or each.registered_as
            for alias, each in named.items()
        }
        candidate = named[CHALLENGER]
        gate = candidate and state.gates.get(candidate.registered_as)
        verdict = gate["verdict"] if gate else "-" if candidate is None else "no decision"
        table.add_row(state.name, shown[CHAMPION], shown[CHALLENGER], verdict, shown[PREVIOUS])
    return table
