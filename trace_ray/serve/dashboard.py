"""The live page: fleet, rollout, live compliance and the last decisions, without any text.

The page itself holds no data. It fetches them from one route, which asks for an admin's key where the
endpoint asks for keys, and may load nothing from anywhere else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from markupsafe import Markup

from trace_ray.core.live import LiveSummary, compare, summarise
from trace_ray.core.policy import Policy
from trace_ray.errors import RolloutError, StateError
from trace_ray.rollout.html_report import page_environment
from trace_ray.rollout.watch import Watched, read_watch
from trace_ray.rollout.waves import read_rollout
from trace_ray.runtime.state_files import StateFiles
from trace_ray.serve.admission import Admission
from trace_ray.serve.config import default_adapter
from trace_ray.serve.follow import Follower
from trace_ray.serve.police import Police
from trace_ray.serve.records import RecentRecords
from trace_ray.serve.replica import BASE_NAME
from trace_ray.serve.table import NameTable

FRESH_S = 1.0
"""Data this young are sent again: however many look, the files are read once a second."""
TEMPLATE, STYLE, SCRIPT = "dashboard.html.j2", "dashboard.css.j2", "dashboard.js"
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
pages = APIRouter()


class LiveData:
    """What the live page shows, gathered at most once a second."""

    def __init__(
        self,
        records: str | None,
        rollout: StateFiles | None,
        police: Mapping[str, Police],
        names: Callable[[], tuple[NameTable, Follower | None]],
    ) -> None:
        """Take the places; nothing is read yet.

        Args:
            records: folder of the records; None = nothing is recorded.
            rollout: files of the fleet's; None = the fleet isn't followed.
            police: by model.
            names: returns the names as they are now, and who follows them.
        """
        self._records = None if records is None else RecentRecords(Path(records))
        self._files, self._police, self._names = rollout, police, names
        self._one = asyncio.Lock()
        self._text, self._made = "", -FRESH_S

    async def json(self) -> str:
        """Return the data."""
        async with self._one:
            if time.monotonic() - self._made >= FRESH_S:
                table, follower = self._names()
                status = None if follower is None else follower.status()
                row = await asyncio.to_thread(self._gathered, table)
                row["registry"] = status
                self._text, self._made = json.dumps(row, allow_nan=False), time.monotonic()
            return self._text

    def _gathered(self, table: NameTable) -> dict[str, Any]:
        problems: list[str] = []
        rollout, live, watched = None, None, list[dict[str, Any]]()
        try:
            rollout = self._rollout()
        except (RolloutError, StateError):
            problems.append("the rollout's state can't be read")
        try:
            watched = [] if self._files is None else [_watched(w) for w in read_watch(self._files)]
        except (RolloutError, StateError):
            problems.append("the watch's state can't be read")
        try:
            live = self._live(table)
        except OSError as error:
            problems.append(f"the records can't be read: {error.strerror}")
        return {
            "at": time.time(),
            "problems": problems,
            **_fleet(table, self._police),
            "rollout": rollout,
            "watched": watched,
            "live": None if live is None else live.to_row(),
        }

    def _live(self, table: NameTable) -> LiveSummary | None:
        if self._records is None:
            return None
        clauses = {
            name: (_named(police.policy), [clause.id for clause in police.policy.clauses])
            for name, police in self._police.items()
        }
        return summarise(self._records.look(), clauses, table.splits)

    def _rollout(self) -> dict[str, Any] | None:
        view = None if self._files is None else read_rollout(self._files)
        if view is None:
            return None
        state = view.state
        return {
            "status": str(state.status),
            "reason": state.reason,
            "wave": state.wave + 1,
            "waves": view.waves,
            "soaked_s": state.soaked_s,
            "at": view.at,
            "margin": None if view.test is None else view.test.margin,
            "tests": [each.to_row() for each in compare(state, view.test)],
        }


def _watched(found: Watched) -> dict[str, Any]:
    return {
        "model": found.model,
        "adapter": found.adapter,
        "complied": found.state.complied,
        "judged": found.state.n,
        "recent_complied": found.state.recent.count("1"),
        "recent": len(found.state.recent),
        "floor": found.config.floor,
    }


def _fleet(table: NameTable, police: Mapping[str, Police]) -> dict[str, Any]:
    models, ids = [], set[str]()
    for model in table.models:
        mine = police.get(model.name)
        adapters = [adapter.id for adapter in model.adapters]
        ids |= {*adapters}
        models.append(
            {
                "name": model.name,
                "base": model.base,
                "answers_as": default_adapter(model) or BASE_NAME,
                "adapters": adapters,
                "mode": "off" if mine is None else mine.settings.mode,
                "policy": mine and _named(mine.policy),
                "shadow_policy": mine and mine.shadow and _named(mine.shadow),
            }
        )
    moving = [route for name, route in table.routes.items() if name not in ids]
    splits = {
        name: table.split_of(table.routes[name]) is not None
        for name in table.splits
        if name in table.routes
    }
    names = [{"name": r.name, "adapter": r.adapter_id or BASE_NAME} for r in moving]
    return {"models": models, "names": names, "splits": splits}


def _named(policy: Policy) -> str:
    return f"{policy.id} {policy.version}"


class DashboardRoutes:
    """The live page's routes, for an ingress that has a door and the data."""

    _door: Admission
    _live: LiveData

    @pages.get("/dashboard")
    async def dashboard(self) -> Response:
        """Send the live page; it holds no data, so that no key is asked for."""
        text, policy = page()
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        return Response(text, 200, headers | _HEADERS, "text/html; charset=utf-8")

    @pages.get("/dashboard/data")
    async def dashboard_data(self, request: Request) -> Response:
        """Send what the live page shows, to an admin."""
        self._door.admin(request)
        headers = {"cache-control": "no-store"} | _HEADERS
        return Response(await self._live.json(), 200, headers, "application/json")


@cache
def page() -> tuple[str, str]:
    """Return the page and its Content-Security-Policy: its own style and script, its own endpoint."""
    environment = page_environment()
    style = environment.get_template(STYLE).render()
    assert environment.loader is not None
    script, _, _ = environment.loader.get_source(environment, SCRIPT)
    text = environment.get_template(TEMPLATE).render(style=Markup(style), script=Markup(script))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
