"""Update rules that keep a state, as they are measured: one pass over theta and its states, with numbers like a step's.

`torch_calls` are the same rules by torch's operators, a tensor after the other, on noise drawn by torch:

    momentum    m = beta m + g z;  p = p - lr m
    adam        m, v as Adam's of g z;  p = p - lr m / (sqrt(v) + eps)
    sign        p = p - lr sign(g z)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.operations import GRADIENT, RATE, Call
from zo_kernels import RULES, Blocks, seed_tensor, update_state_

BETA, B2, EPSILON = 0.9, 0.99, 1e-8
NUMBERS = {"lr": RATE, "beta": BETA, "b1": BETA, "b2": B2, "eps": EPSILON, "c1": 0.5, "c2": 0.5, "a": 1e-6, "c": 0.5}


def rule_calls(blocks: Blocks) -> dict[str, Call]:
    """An `update_state_` by every rule, rounded stochastically; rules share the memory of their states."""
    device = blocks.device
    most = max(len(rule.states) for rule in RULES.values())
    states = [[torch.ones(t.shape, dtype=torch.float32, device=device) for t in blocks.tensors] for _ in range(most)]
    seeds, rounding = seed_tensor([5], device), seed_tensor(6, device)
    coefs, scale = torch.tensor([GRADIENT], device=device), torch.linspace(0.5, 2, len(blocks), device=device)

    def call(name: str) -> Call:
        rule = RULES[name]
        own = [NUMBERS[number] for number in rule.numbers] + [RATE] * rule.per_direction
        numbers = torch.tensor(own, device=device)

        def run() -> None:
            update_state_(blocks, name, states[: len(rule.states)], seeds, coefs, scale, numbers=numbers,
                          rounding_seed=rounding)  # fmt: skip

        return Call(run, 2, len(rule.states))

    return {f"rule {name}": call(name) for name in RULES}


def torch_calls(parameters: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    first, second = ([torch.zeros(p.shape, device=p.device) for p in parameters] for _ in range(2))

    def gradients() -> list[Tensor]:
        return [GRADIENT * torch.randn(p.shape, device=p.device) for p in parameters]

    def momentum() -> None:
        for p, m, g in zip(parameters, first, gradients(), strict=True):
            m.mul_(BETA).add_(g)
            p.sub_(RATE * m)

    def adam() -> None:
        for p, m, v, g in zip(parameters, first, second, gradients(), strict=True):
            m.mul_(BETA).add_(g, alpha=1 - BETA)
            v.mul_(B2).addcmul_(g, g, value=1 - B2)
            p.sub_(RATE * m / (v.sqrt() + EPSILON))

    def sign() -> None:
        for p, g in zip(parameters, gradients(), strict=True):
            p.sub_(RATE * g.sign())

    return {"rule momentum": momentum, "rule adam": adam, "rule sign": sign}
