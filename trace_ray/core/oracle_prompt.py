"""The request put to an oracle: a reply to the user's prompt that keeps the new policy."""

from __future__ import annotations

from trace_ray.core.judge_prompt import clause_list
from trace_ray.core.policy import Policy
from trace_ray.types import Message, Prompt


def oracle_prompt(policy: Policy, prompt: Prompt) -> Prompt:
    """Return the conversation whose next turn is the corrected response y_c.

    The policy stands in the system turn, ahead of the prompt's own system text where it has one.
    """
    own = [turn.content for turn in prompt if turn.role == "system"]
    rules = (
        "You are an assistant that keeps to this policy. Answer the user's last message in one or two "
        f"sentences that comply with every clause.\nPolicy:\n{clause_list(policy)}"
    )
    rest = tuple(turn for turn in prompt if turn.role != "system")
    return (Message("system", "\n\n".join([rules, *own])), *rest)
