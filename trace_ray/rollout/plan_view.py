"""A plan as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trace_ray.rollout.estimate import GIB, Cost
from trace_ray.rollout.planning import BLOCKED, CHANGES, FleetPlan, ModelPlan
from trace_ray.rollout.triage_plan import TriagePlan
from trace_ray.types import Category

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def plan_view(plan: FleetPlan) -> Group:
    """Return the plan's tables: clauses, triage, models with their stages, and the sum."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [*_clauses(plan.models)]
    if plan.triage is not None:
        parts.append(Text(triage_text(plan.triage)))
    parts.append(_table(plan.models))
    for model in plan.models:
        if model.why:
            parts.append(Text(f"{model.name}: {model.why}"))
        if model.memory and model.action != BLOCKED:
            size = model.memory_bytes / GIB
            parts.append(Text(f"{model.name}: peak memory about {size:.1f} GiB ({model.memory})"))
        parts += [
            Text(f"  {cost.stage}: {_seconds(cost)}; {cost.basis}")
            for cost in model.stages
            if not cost.reused and model.action == CHANGES
        ]
    counts = {action: 0 for action in (CHANGES, "no change", BLOCKED)}
    for model in plan.models:
        counts[model.action] += 1
    parts.append(Text("plan: " + ", ".join(f"{n} {action}" for action, n in counts.items())))
    if plan.changes:
        parts.append(Text(f"devices, the triage included: {plan.spent}"))
    return Group(*parts)


def triage_text(found: TriagePlan) -> str:
    """Return the sentence on the triage."""
    shares = ", ".join(
        f"{category} {_share(found, category)}"
        for category in (Category.INVERT, Category.PUNISH, Category.RETAIN, Category.UNJUDGED)
    )
    if found.done:
        return f"triage: done, {found.pairs} pairs: {shares} (judge {found.judge})"
    tokens = "" if found.tokens is None else f", {found.tokens} tokens"
    time = f"{found.seconds:.0f} s, {found.spent}"
    return (
        f"triage: {found.judged} of {found.pairs} pairs judged by {found.judge}: {shares}\n"
        f"  still to judge: {found.judge_calls} calls{tokens}, {time} ({found.basis})"
    )


def _share(found: TriagePlan, category: str) -> str:
    share = found.shares[category]
    text = f"{100 * share.value:.1f}%"
    if share.ci_low == share.ci_high:
        return text
    return f"{text} [{100 * share.ci_low:.1f}, {100 * share.ci_high:.1f}]"


def _clauses(models: list[ModelPlan]) -> list[RenderableType]:
    """One table of clauses for each policy that models run now."""
    from rich.table import Table

    found: list[RenderableType] = []
    by_policy: dict[str, list[ModelPlan]] = {}
    for model in models:
        if model.changes:
            by_policy.setdefault(model.policy_now, []).append(model)
    for policy, those in by_policy.items():
        names = ", ".join(model.name for model in those)
        table = Table(title=f"{names}: now {policy}", title_justify="left")
        for column in ("clause", "change", "differs in"):
            table.add_column(column)
        for row in those[0].changes:
            table.add_row(*row)
        found.append(table)
    return found


def _table(models: list[ModelPlan]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("model", "action", "policy now", "reused", "to do", "seconds", "devices"):
        table.add_column(column)
    for model in models:
        reused = ", ".join(cost.stage for cost in model.stages if cost.reused)
        todo = ", ".join(cost.stage for cost in model.stages if not cost.reused)
        seconds = sum(cost.seconds or 0 for cost in model.stages)
        color = {"no change": "green", BLOCKED: "red"}.get(model.action, "yellow")
        action = Text(model.action, style=color)
        cells = [reused, todo, f"{seconds:.1f}", str(model.spent)]
        table.add_row(model.name, action, model.policy_now, *cells)
    return table


def _seconds(cost: Cost) -> str:
    return "unknown" if cost.seconds is None else f"{cost.seconds:.1f} s, {cost.spent}"
