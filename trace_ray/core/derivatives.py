"""Directional derivatives: how fast log-probabilities change along one direction in the parameters.

    d(y) = <g, grad log pi(y|x)> = d/dt log pi_{theta + t g}(y|x)  at t = 0

The engines know nothing of the model. They take ``values_at(steps)``, the values of a batch as a
function of a step t for each of its N rows (``models.likelihood`` is one such function), and never
form a gradient in the parameters, let alone one per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Params = dict[str, Tensor]
ValuesFn = Callable[[Tensor], Tensor]
"""Steps [N] to values [E]; a value depends on the step of its own row alone."""
LogpsFn = Callable[[Params], Tensor]
"""Parameters by name to sequence log-probabilities [S]."""


def jvp_derivatives(values_at: ValuesFn, steps: Tensor) -> Tensor:
    """Return the derivative of every value by forward-mode differentiation: exact, in one pass.

    Needs operations with a forward-mode rule (attention: ``eager``; SDPA on the CPU has none).

    Args:
        values_at: the values [E] as a function of the steps.
        steps: zeros [N]: where to differentiate, and in which dtype and on which device.

    Returns:
        [E], detached, in the dtype of the values.
    """
    with torch.no_grad():
        derivatives: Tensor = torch.func.jvp(values_at, (steps,), (torch.ones_like(steps),))[1]
    return derivatives.detach()


def ghost_derivatives(values_at: ValuesFn, steps: Tensor) -> Tensor:
    """Return, for every row, the derivative of the sum of its values: exact, one backward pass.

    Because rows don't mix, the gradient of the sum of ALL values in the N steps holds each row's
    own. Where ``values_at`` adds t_i s (dB A + B dA) x to the output of a LoRA layer, autograd's
    rule for t_i is the sum over row i's tokens of <output gradient, s (dB A + B dA) x>: the "ghost"
    inner product <g, per-sample gradient> without the gradient (Goodfellow, arXiv 1510.01799, does
    the same for norms). The parameters need no gradient, so none of theirs is computed.

    Args:
        values_at: the values [E] as a function of the steps.
        steps: zeros [N].

    Returns:
        [N], detached, in the dtype of the steps.
    """
    with torch.enable_grad():
        leaf = steps.detach().clone().requires_grad_()
        total = values_at(leaf).sum()
        if not total.requires_grad:  # the values don't depend on the steps at all
            return torch.zeros_like(steps)
        (derivatives,) = torch.autograd.grad(total, leaf)
    return derivatives


def fd_derivatives(values_at: ValuesFn, steps: Tensor, scale: float, eps: float = 5e-5) -> Tensor:
    """Return the derivative of every value by a central difference: two plain passes.

        d ~ [value(h) - value(-h)] / (2 h),   h = eps / rms(g)

    Args:
        values_at: the values [E] as a function of the steps, computed in float32 or better (in
            bfloat16 the difference is noise).
        steps: zeros [N].
        scale: rms(g), the root mean square of the entries of g that are not 0.
        eps: how far a parameter that moves does so, in the root mean square: alike for small models
            and large ones. Shorter moves drown in the rounding of float32 log-probabilities, longer
            ones in the third derivative.

    Returns:
        [E], detached; all 0 for a zero direction.

    Raises:
        ValueError: the steps have less precision than float32.
    """
    if steps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"finite differences need float32; the steps are {steps.dtype}")
    step = eps / scale if scale > 0 else 0.0
    with torch.no_grad():
        difference = values_at(steps + step) - values_at(steps - step)
    return difference * (scale / (2 * eps))


def per_sample_derivatives(logps_fn: LogpsFn, params: Params, direction: Params) -> Tensor:
    """Return d(y) of every sequence by one backward pass each: slow, the check of the others.

    Args:
        logps_fn: maps parameters to sequence log-probabilities, [S].
        params: where to differentiate (theta_ref).
        direction: g, same names and shapes.

    Returns:
        [S], detached.

    Raises:
        ValueError: the direction has other names than the parameters.
    """
    if params.keys() != direction.keys():
        odd = sorted(params.keys() ^ direction.keys())
        raise ValueError(f"params and direction differ in {len(odd)} names, e.g. {odd[0]!r}")
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        logps = logps_fn(leaves)
    derivatives = torch.zeros_like(logps, requires_grad=False)
    for s in range(len(logps)):
        grads = torch.autograd.grad(
            logps[s], list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                derivatives[s] += (grad * direction[name]).sum()
    return derivatives


def scale_of(direction: Params) -> float:
    """Return rms(g), the root mean square over the entries of all parameters that are not 0."""
    total = sum(float(g.double().square().sum()) for g in direction.values())
    moved = sum(int(g.count_nonzero()) for g in direction.values())
    return math.sqrt(total / moved) if moved else 0.0
