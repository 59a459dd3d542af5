"""``trace-ray rollout``: who is champion, and who becomes it."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from trace_ray.commands.wiring import ConfigPath, exits_cleanly, terminal

if TYPE_CHECKING:
    from trace_ray.core.waves import Wave, WavePlan, WaveState
    from trace_ray.rollout.events import Tell
    from trace_ray.rollout.watch import ChampionWatch, Watched
    from trace_ray.rollout.waves import WaveRollout

T = TypeVar("T")
app = typer.Typer(help="Promote candidates, and take them back.", no_args_is_help=True)

Models = Annotated[
    list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")
]
_USUAL_RATE, _DROPS = 0.95, (0.05, 0.2)
"""Compliance of the champion, and drops of the candidate's, for which ``start`` says what it takes."""
_FALL = 0.1
"""Fall below the floor for which a watch says what it takes to find it."""
_EVENTS = {"promote": "rollout.promoted", "withdraw": "rollout.withdrawn"}
Every = Annotated[float, typer.Option(help="Repeat after so many seconds; 0 = once.")]
Force = Annotated[str, typer.Option(help="Do it nevertheless; the reason is kept.")]


@app.command("status")
def status(config: ConfigPath) -> None:
    """Show each model's champion, challenger with the gate's word, and previous champion."""
    with exits_cleanly():
        from trace_ray.rollout.promotion import Rollouts, status_table
        from trace_ray.rollout.watch import read_watch
        from trace_ray.rollout.waves import WaveRollout

        rollouts = Rollouts(str(config))
        terminal().print(status_table(rollouts.states()))
        if state := WaveRollout(str(config)).state():
            typer.echo(_wave_line(state))
        for watched in read_watch(rollouts.files):
            typer.echo(f"watched: {_watch_line(watched)}")
        if change := rollouts.journal.pending():
            typer.echo(
                f"a {change['what']} by {change['who']} was cut short: the next promote, rollback "
                "or serve does the rest of it"
            )


@app.command("promote")
def promote(config: ConfigPath, model: Models = None, force: Force = "") -> None:
    """Make challengers champions where the gate said promote: all of them, or none."""
    with exits_cleanly():
        from trace_ray.rollout.events import announced
        from trace_ray.rollout.promotion import Rollouts

        with announced(str(config), "promote") as told:
            change = Rollouts(str(config)).promote(model or (), force)
            told |= change or {"models": []}
        _say(change, "no challenger to promote")


@app.command("rollback")
def rollback(
    config: ConfigPath,
    model: Models = None,
    to_policy: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Policy version to go back to.")
    ] = None,
    force: Force = "",
) -> None:
    """Bring earlier champions back: the previous ones, or those of a policy version."""
    with exits_cleanly():
        from trace_ray.rollout.events import announced
        from trace_ray.rollout.promotion import Rollouts

        with announced(str(config), "rollback") as told:
            change = Rollouts(str(config)).rollback(model or (), to_policy, force)
            told |= change or {"models": []}
        _say(change, "nothing to go back to: every model is there already")


@app.command("start")
def start(config: ConfigPath) -> None:
    """Begin a rollout in waves of the candidates that the gate let through."""
    with exits_cleanly():
        from trace_ray.rollout.events import telling
        from trace_ray.rollout.waves import WaveRollout

        rollout = WaveRollout(str(config))
        rollout.start()
        with telling(str(config)) as tell:
            tell("rollout.started", {"waves": rollout.plan.to_row()["waves"]})
        for number, wave in enumerate(rollout.plan.waves, 1):
            typer.echo(f"wave {number}: {', '.join(wave.models)}: {100 * wave.share:g}% of traffic")
            typer.echo(f"  {_samples_line(rollout.plan, wave)}")
        typer.echo(f"next: trace-ray rollout step {config} --every 60")


@app.command("step")
def step(config: ConfigPath, every: Every = 0) -> None:
    """Take in the live records that came since, and promote or withdraw; exit 1 once withdrawn."""
    with exits_cleanly(config):
        from trace_ray.rollout.events import telling
        from trace_ray.rollout.waves import WaveRollout

        rollout, status = WaveRollout(str(config)), ""
        with telling(str(config)) as tell:
            for state in _repeated(lambda: _stepped(rollout, tell), every, tell):
                if (status := state.status) in ("done", "stopped"):
                    break
    sys.exit(1 if status == "stopped" else 0)


@app.command("watch")
def watch(config: ConfigPath, every: Every = 0) -> None:
    """Look at the champions' live compliance; roll back where it fell (exit 1; with --every go on)."""
    with exits_cleanly(config):
        from trace_ray.rollout.events import telling
        from trace_ray.rollout.watch import ChampionWatch

        watching = ChampionWatch(str(config))
        with telling(str(config)) as tell:
            last = deque(_repeated(lambda: _watched(watching, tell), every, tell), maxlen=1)
    sys.exit(1 if any(last) else 0)


def _repeated(once: Callable[[], T], every: float, tell: Tell) -> Iterator[T]:
    """Yield what ``once`` returns, again every so many seconds; with 0 only one time.

    A registry or a bucket that is away must not end the watch over a model: that is told, once, and
    tried again.
    """
    from trace_ray.errors import BusyError, RegistryError, StateError

    lost = False
    while True:
        try:
            found = once()
        except (RegistryError, BusyError, StateError) as error:
            if not every:
                raise
            typer.echo(f"{error}; tried again in {every:g} s", err=True)
            if not lost:
                tell("rollout.waiting", {"error": str(error)})
            lost = True
        else:
            lost = False
            yield found
            if not every:
                return
        time.sleep(every)


def _watched(watching: ChampionWatch, tell: Tell) -> bool:
    """Take one step of a watch, say and send what it found; return whether that was a drop."""
    found, left_out = watching.step()
    for text in left_out:
        typer.echo(f"not watched: {text}", err=True)
    for each in found:
        typer.echo(_watch_line(each))
        if each.alarm:
            done = f"rolled back to {each.back_to}" if each.back_to else "nothing was moved"
            typer.echo(f"{each.alarm}; {done}")
            about = {"model": each.model, "adapter": each.adapter, "reason": each.alarm}
            tell("rollout.dropped", about | {"rolled_back_to": each.back_to or None})
    return any(each.alarm for each in found)


def _watch_line(watched: Watched) -> str:
    """Return where a champion's watch stands, and what it would take to find a drop."""
    from trace_ray.core.drops import mean_delay

    config, state = watched.config, watched.state
    line = (
        f"{watched.model}: {watched.adapter}: {state.complied} of {state.n} judged replies comply, "
        f"floor {100 * config.floor:.1f}%"
    )
    if (fallen := config.floor - _FALL) > 0:
        delay = math.ceil(mean_delay(config, fallen))
        line += f"; a fall to {100 * fallen:.0f}% is found within {delay:,} of them on average"
    return line


def _stepped(rollout: WaveRollout, tell: Tell) -> WaveState:
    """Take one step, and say and send what it led to; the report shows how it ended."""
    from trace_ray.errors import TraceRayError
    from trace_ray.rollout.html_report import write_html

    before = rollout.state()
    state, actions = rollout.step()
    for action in actions:
        typer.echo(f"{action.model}: {action.what}: {action.reason}")
        about = {"model": action.model, "reason": action.reason}
        tell(_EVENTS[action.what], about | {"rollout": state.status})
    if state.status in ("done", "stopped") and before and before.status != state.status:
        tell(f"rollout.{state.status}", {"reason": state.reason})
        try:
            typer.echo(f"report: {write_html(rollout.rollouts.source)}")
        except TraceRayError as error:  # the decision stands without its page
            typer.echo(f"the report could not be written anew: {error}", err=True)
    typer.echo(_wave_line(state))
    return state


@app.command("pause")
def pause(config: ConfigPath) -> None:
    """Stop taking in records; candidates stay where they are."""
    _paused(config, True)


@app.command("resume")
def resume(config: ConfigPath) -> None:
    """Go on with a paused rollout."""
    _paused(config, False)


def _paused(config: ConfigPath, paused: bool) -> None:
    with exits_cleanly():
        from trace_ray.rollout.events import telling
        from trace_ray.rollout.waves import WaveRollout

        state = WaveRollout(str(config)).pause(paused)
        with telling(str(config)) as tell:
            tell("rollout.paused" if paused else "rollout.resumed", {"wave": state.wave + 1})
        typer.echo(_wave_line(state))


def _samples_line(plan: WavePlan, wave: Wave) -> str:
    drops = {drop: plan.requests_to_catch(wave.share, _USUAL_RATE, drop) for drop in _DROPS}
    told = [f"{n:,} (down to {100 * (_USUAL_RATE - drop):.0f}%)" for drop, n in drops.items()]
    return (
        f"a champion that complies in {100 * _USUAL_RATE:.0f}% of its replies: a worse candidate is "
        f"withdrawn within {' or '.join(told)} judged requests to its model, 19 times in 20"
    )


def _wave_line(state: WaveState) -> str:
    line = f"rollout: {state.status}, wave {state.wave + 1}, {state.soaked_s:.0f} s soaked"
    if state.status == "running" and not state.tests:
        line += "; no request of this rollout was recorded so far"
    for model, tests in state.tests.items():
        if (seen := tests.get("compliance")) is not None:
            line += (
                f"; {model}: candidate {seen.candidate_complied} of {seen.candidate_n} comply, "
                f"champion {seen.champion_complied} of {seen.champion_n}"
            )
    return f"{line}; {state.reason}" if state.reason else line


@app.command("report")
def report(
    config: ConfigPath,
    run: Annotated[str | None, typer.Option(help="Run id; the newest if left out.")] = None,
) -> None:
    """Write a run's page anew, with the decisions since; apply writes the first."""
    with exits_cleanly(config):
        from trace_ray.rollout.html_report import write_html

        typer.echo(write_html(str(config), run))


def _say(change: dict[str, Any] | None, nothing: str) -> None:
    if change is None:
        typer.echo(nothing)
        return
    for row in change["models"]:
        typer.echo(f"{row['name']}: champion {row['before'] or 'none'} -> {row['after']}")
    if change["forced"]:
        typer.echo(f"forced: {change['forced']}")
