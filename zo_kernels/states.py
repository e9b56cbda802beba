"""`update_state_`: an update by a rule that keeps state, theta and its states in one pass.

Bytes moved per element: 4 for 16-bit weights and 8 for every fp32 state (12, 20 and 28 for momentum, Adam, AdaMM).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.arguments import (
    require,
    require_directions,
    require_form,
    require_optional,
    require_states,
    require_states_apart,
)
from zo_kernels.blocks import Blocks
from zo_kernels.dispatch import backend
from zo_kernels.forms import Form
from zo_kernels.parts import parts_of
from zo_kernels.rules import RULES


@torch.no_grad()
def update_state_(
    blocks: Blocks,
    rule: str,
    states: Sequence[Sequence[Tensor]],
    seeds: Tensor,
    coefs: Tensor,
    scale: Tensor | None = None,
    *,
    numbers: Tensor,
    form: Form | None = None,
    decay: Tensor | None = None,
    rounding_seed: Tensor | None = None,
    keep: Tensor | None = None,
    dist: str = "normal",
) -> None:
    """theta and its states by one of `zo_kernels.rules`, whose equations are there.

    states: for each state of the rule, in its order, a list of one tensor per block: fp32, contiguous, shaped like the
    block, sharing no memory.  seeds, coefs, scale, decay, rounding_seed, form: as of `update_`, but the sum of the
    directions is what the rule takes for a gradient (coefs = the projected gradients), and theta moves against it
    (`curvature` and `shifted-mean` move along it, as `update_`).  numbers: the rule's, (n,) fp32 on the device.
    keep: 0-dim bool; where it is False the call leaves every bit of theta and states (a step whose losses were not
    finite), without waiting for the host.  ValueError naming the rule, the state and the block, or the argument."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are: {', '.join(RULES)}")
    kind = RULES[rule]
    blocks.refresh()
    require_directions(seeds, coefs, scale, (len(blocks),), blocks.device, dist)
    if len(states) != len(kind.states):
        raise ValueError(f"{rule} has {len(kind.states)} states ({', '.join(kind.states)}), got {len(states)}")
    named = dict(zip(kind.states, states, strict=True))
    for name, tensors in named.items():
        require_states(blocks, name, tensors)
    require_states_apart(blocks, named)
    directions = seeds.shape[0] if kind.per_direction else 0
    require(numbers, "numbers", torch.float32, (len(kind.numbers) + directions,), blocks.device)
    require_optional({"decay": decay}, torch.float32, blocks.device)
    require_optional({"rounding_seed": rounding_seed}, torch.int64, blocks.device)
    require_optional({"keep": keep}, torch.bool, blocks.device)
    if form is not None and not kind.forms:
        raise ValueError(f"{rule} makes its own form of the directions: pass form=None")
    require_form(form, blocks)
    parts = parts_of(blocks)
    if parts:
        for part in parts:
            update_state_(
                part.blocks, rule, [part.of_list(tensors) for tensors in states], part.sent(seeds), part.sent(coefs),
                part.chosen(scale), numbers=part.sent(numbers), form=part.formed(form), decay=part.sent(decay),
                rounding_seed=part.sent(rounding_seed), keep=part.sent(keep), dist=dist,
            )  # fmt: skip
        return
    backend(blocks.device.type).update_state_(
        blocks, rule, states, seeds, coefs, scale, numbers, form, decay, rounding_seed, keep, dist
    )
