"""The follower and the table of names, without an engine: what moves a name, and what doesn't."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.split import Split
from trace_ray.errors import RegistryError, ServeError
from trace_ray.serve.calls import Call, sticky_key, until_end
from trace_ray.serve.config import Route, ServedAdapter, ServedModel
from trace_ray.serve.follow import FleetView, Follower, renamed
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.table import NameTable

ONE, TWO, THREE = (
    ServedAdapter(id=f"m@{n}-{n * 8}", path=f"/a/{n}", sha256=n * 64) for n in ("1", "2", "3")
)
MODEL = ServedModel(
    name="m", base="/base", adapters=[ONE.model_copy(update={"aliases": ["champion"]})]
)
SPLIT = Split("r", ONE.id, TWO.id, 0.5)


class Registered:
    """A registry in this process: versions 1 to 3, and whatever goes wrong."""

    def __init__(self) -> None:
        self.view_now: FleetView | Exception | None = None
        self.refuse: dict[int, Exception] = {}
        self.loaded: list[str] = []
        self.asked = 0

    def names(self, splits: dict[str, Split] | None = None, /, **aliases: int) -> None:
        self.view_now = FleetView({"m": aliases}, splits or {})

    def view(self) -> FleetView | None:
        if isinstance(self.view_now, Exception):
            raise self.view_now
        return self.view_now

    def adapter(self, model: ServedModel, version: int) -> ServedAdapter:
        self.asked += 1
        if version in self.refuse:
            raise self.refuse[version]
        return (ONE, TWO, THREE)[version - 1]

    async def load(self, base: str, row: dict[str, str]) -> None:
        assert (base, set(row)) == ("/base", {"id", "path", "sha256"})
        self.loaded.append(row["id"])

    def follower(self, refresh_s: float = 0.01) -> Follower:
        return Follower(self, refresh_s, [MODEL], self.load, Metrics())


def led(follower: Follower) -> dict[str, str | None]:
    return {name: route.adapter_id for name, route in follower.table.routes.items()}


def test_a_promotion_and_a_withdrawal_move_names_and_every_id_stays() -> None:
    async def story() -> None:
        fleet = Registered()
        follower = fleet.follower(1)
        fleet.names(champion=1, challenger=2)
        await follower.look()
        assert led(follower)["m"] == ONE.id
        assert led(follower)["m@challenger"] == TWO.id
        taken = follower.table.routes["m"]
        fleet.names(champion=2, previous=1)
        await follower.look()
        assert (led(follower)["m"], led(follower)["m@previous"]) == (TWO.id, ONE.id)
        assert "m@challenger" not in led(follower)
        assert follower.table.routes["m"].sha256 == TWO.sha256
        assert taken.adapter_id == ONE.id  # a request in flight holds its route
        fleet.names(champion=1)
        await follower.look()
        assert (led(follower)["m"], led(follower)[TWO.id]) == (ONE.id, TWO.id)
        assert fleet.loaded == [TWO.id]  # once; 1 was there
        assert fleet.asked == 2

    asyncio.run(story())


@pytest.mark.parametrize("problem", [RegistryError("sqlite:///secret: gone"), OSError(), None])
def test_a_registry_that_is_down_or_a_change_under_way_moves_nothing(
    problem: Exception | None,
) -> None:
    async def story() -> None:
        fleet = Registered()
        follower = fleet.follower()
        table = follower.table
        fleet.view_now = problem
        await follower.look()
        await follower.look()
        assert follower.table is table
        assert follower.status()["read_s_ago"] is None
        assert follower.status()["problem"]
        assert "secret" not in str(follower.status())
        fleet.names(champion=1)
        await follower.look()
        assert follower.status()["problem"] == ""

    asyncio.run(story())


def test_a_version_that_is_refused_leaves_the_alias_and_is_tried_again_later() -> None:
    async def story() -> None:
        fleet = Registered()
        follower = fleet.follower(0.2)
        fleet.refuse[2] = RegistryError("its files are another adapter")
        fleet.names(champion=2, previous=1, challenger=3)
        await follower.look()
        assert led(follower)["m"] == led(follower)["m@champion"] == ONE.id
        assert led(follower)["m@challenger"] == THREE.id  # what is sound moves
        assert TWO.id not in led(follower)
        assert follower.status()["refused"] == ["m version 2"]
        asked = fleet.asked
        await follower.look()
        assert fleet.asked == asked  # not at every look
        del fleet.refuse[2]
        await asyncio.sleep(0.41)
        await follower.look()
        assert led(follower)["m"] == TWO.id
        assert follower.status()["refused"] == []

    asyncio.run(story())


def test_an_adapter_that_no_engine_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuses(base: str, row: dict[str, str]) -> None:
        raise ServeError("rank too large")

    async def story() -> None:
        fleet = Registered()
        follower = Follower(fleet, 1, [MODEL], refuses, Metrics())
        fleet.names(champion=2)
        await follower.look()
        assert led(follower)["m"] == ONE.id
        assert follower.status()["refused"] == ["m version 2"]

    asyncio.run(story())


def test_a_slow_download_holds_up_no_other_move() -> None:
    async def story() -> None:
        fleet = Registered()
        arrived = asyncio.Event()

        async def slow(base: str, row: dict[str, str]) -> None:
            if row["id"] == THREE.id:
                await arrived.wait()

        follower = Follower(fleet, 0.02, [MODEL], slow, Metrics())
        fleet.names(champion=2, challenger=3)
        await follower.look()
        assert (led(follower)["m"], "m@challenger" in led(follower)) == (TWO.id, False)
        arrived.set()
        await follower.look()
        assert led(follower)["m@challenger"] == THREE.id

    asyncio.run(story())


def test_a_model_that_is_registered_anew_is_read_anew() -> None:
    """MLflow counts its versions from 1 again."""

    async def story() -> None:
        fleet, first, again = Registered(), asyncio.Event(), {1: TWO}
        fleet.adapter = lambda model, version: again[version]  # type: ignore[method-assign]

        async def load(base: str, row: dict[str, str]) -> None:
            if row["id"] == THREE.id:
                await first.wait()

        follower = Follower(fleet, 0.5, [MODEL], load, Metrics())
        fleet.names(champion=1)
        await follower.look()
        assert led(follower)["m"] == TWO.id
        fleet.view_now, again[1] = FleetView({}, {}), THREE
        await follower.look()
        assert led(follower)["m"] == TWO.id  # its model is gone: it serves on
        fleet.names(champion=1)
        await follower.look()  # the new one is being loaded ...
        fleet.view_now, again[1] = FleetView({}, {}), ONE
        await follower.look()
        fleet.names(champion=1)
        first.set()
        await follower.look()  # ... and was deleted before it was
        assert led(follower)["m"] == ONE.id

    asyncio.run(story())


def test_a_name_is_never_given_other_weights() -> None:
    other = ONE.model_copy(update={"sha256": "f" * 64})
    with pytest.raises(ValueError, match="need a new id"):
        renamed(MODEL, {"champion": other}, "champion")
    with pytest.raises(ValueError, match="used twice"):
        renamed(MODEL, {"base": TWO}, "champion")


def test_a_bare_name_moves_with_its_alias_alone() -> None:
    bare = ServedModel(name="m", base="/base")
    tried = renamed(bare, {"challenger": TWO}, "champion")
    assert NameTable.of([tried], {}).routes["m"].adapter_id is None
    named = renamed(tried, {"champion": THREE, "challenger": TWO}, "champion")
    assert NameTable.of([named], {}).routes["m"].adapter_id == THREE.id
    lost = renamed(named, {"challenger": TWO}, "champion")
    routes = NameTable.of([lost], {}).routes
    assert (routes["m"].adapter_id, "m@champion" in routes) == (THREE.id, False)


def split_table(**more: Any) -> NameTable:
    model = renamed(MODEL, {"champion": ONE, "challenger": TWO} | more, "champion")
    return NameTable.of([model], {"m": SPLIT})


@given(st.text())
def test_the_bare_name_alone_is_split(key: str) -> None:
    table = split_table()
    for name in (ONE.id, TWO.id, "m@champion", "m@challenger", "m@base"):
        assert table.answerer(table.routes[name], key) is table.routes[name]
    route = table.answerer(table.routes["m"], key)
    assert (route.name, route.adapter_id in (ONE.id, TWO.id)) == ("m", True)
    assert route.adapter == {"id": route.adapter_id, "path": route.path, "sha256": route.sha256}


@pytest.mark.parametrize("moved", [{"champion": TWO}, {"challenger": THREE}])
def test_a_split_ends_with_the_alias_that_moves(moved: dict[str, ServedAdapter]) -> None:
    table = split_table(**moved)
    assert table.split_of(table.routes["m"]) is None
    answers = {table.answerer(table.routes["m"], str(i)).adapter_id for i in range(50)}
    assert answers == {table.routes["m"].adapter_id}


def test_a_split_goes_by_the_header_then_the_user_then_the_request() -> None:
    assert sticky_key({"x-request-key": "k"}, {"user": "u"}, "r") == "k"
    assert sticky_key({}, {"user": "u"}, "r") == "u"
    assert sticky_key({}, {"user": ["u"]}, "r") == sticky_key({}, {}, "r") == "r"


def call(**more: Any) -> Call:
    route = Route(name="m", base="/base", adapter_id=TWO.id, kind="adapter", model="m")
    given: dict[str, Any] = {"request": None, "key": None, "body": {}, "route": route}
    return Call(**given | {"request_id": "r", "started": 0.0} | more)


def test_what_is_recorded_of_an_end() -> None:
    assert call().outcome(200) is None
    for status in (400, 404, 429, 499):  # the client's own
        assert call(tried=True).outcome(status) is None
    good, bad = call(tried=True).outcome(200), call().outcome(503)
    assert good is not None
    assert bad is not None
    assert (good["failed"], bad["failed"], bad["adapter"]) == (False, True, TWO.id)
    assert good["request_s"] > 0


def test_a_stream_tells_how_it_ended() -> None:
    found: list[int] = []

    async def parts(events: Iterator[str], fails: bool = False) -> Any:
        for event in events:
            yield event
        if fails:
            raise ServeError("lost")

    async def story() -> None:
        for events in (["data: {}"], ['data: {"error": {}}', "data: [DONE]"]):
            assert [each async for each in until_end(parts(iter(events)), found.append)] == events
        with pytest.raises(ServeError):
            _ = [each async for each in until_end(parts(iter([]), True), found.append)]
        left = until_end(parts(iter(["a", "b"])), found.append)
        await anext(left)
        await left.aclose()  # type: ignore[attr-defined]

    asyncio.run(story())
    assert found == [200, 500, 500, 499]
