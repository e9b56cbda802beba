"""ScaleNet: the scales of the improved recipe, in logarithms and of scale-free inputs.

    sigma_b = kept_b * exp(log_base_b + w2 . tanh(W1 x_b + b1))

One small network for all blocks, so that it means something for a block it never saw, and one number per block.  The
last layer and log_base start at zero: sigma is exactly 1 everywhere, MeZO, until something has been learned.
A closed-form scale is the same thing with the network left at zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zo_finetuner.block_kinds import KINDS, block_kind, depths
from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_finetuner.pertnn import select_rows
from zo_kernels import BlockStats

STATIC = ("log numel", "relative depth", *(f"kind {kind}" for kind in KINDS))
DYNAMIC = ("log root mean square", "log of running over first loss")
FEATURES = STATIC + DYNAMIC


class ScaleNet(nn.Module):
    """Scales of N blocks.

    Args (fp32 tensors): x (N, len(STATIC)) inputs that never change; log_base (N,); kept (N,) of 0 and 1: a block that
    is not kept has scale exactly 0; w1 (hidden, len(FEATURES)), b1 (hidden,), w2 (hidden,).
    names: the blocks, as in `named_parameters()`.  source: where this comes from, for messages.

    Raises: InputError when a name stands twice; ValueError when shapes and names do not fit together.
    """

    def __init__(self, names: Sequence[str], x: Tensor, log_base: Tensor, kept: Tensor, w1: Tensor, b1: Tensor,
                 w2: Tensor, *, source: str = "these scales") -> None:
        super().__init__()
        self.names, self.source = tuple(names), source
        n, hidden = len(self.names), b1.shape[0]
        if len(set(self.names)) != n:
            twice = Counter(self.names).most_common(1)[0][0]
            raise InputError(f"{source}: two scales are named {twice}; a block has one")
        shapes = {"x": (n, len(STATIC)), "log_base": (n,), "kept": (n,), "w1": (hidden, len(FEATURES)),
                  "b1": (hidden,), "w2": (hidden,)}
        for label, tensor in (("x", x), ("log_base", log_base), ("kept", kept), ("w1", w1), ("b1", b1), ("w2", w2)):
            if tuple(tensor.shape) != shapes[label]:
                raise ValueError(f"{label} has shape {tuple(tensor.shape)}; {n} blocks need {shapes[label]}")
            value = tensor.detach().to(torch.float32)
            if label in ("x", "kept"):
                self.register_buffer(label, value)
            else:
                self.register_parameter(label, nn.Parameter(value))

    @property
    def hidden(self) -> int:
        """Width of the hidden layer."""
        return self.b1.shape[0]

    @classmethod
    def fresh(cls, names: Sequence[str], numels: Sequence[int], *, hidden: int = 16) -> ScaleNet:
        """sigma = 1 for every block; fp32 on the CPU, nothing drawn.  The first layer is a fixed spread of directions
        (cosines of different frequencies): with w2 at zero any first layer starts the same, and this one needs no
        seed."""
        names, width = list(names), len(FEATURES)
        units, inputs = torch.arange(hidden)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
        w1 = torch.cos(math.pi * units * inputs / width) * math.sqrt(2 / width)
        return cls(names, static_inputs(names, numels), torch.zeros(len(names)), torch.ones(len(names)), w1,
                   torch.zeros(hidden), torch.zeros(hidden), source="fresh scales, all 1")

    @classmethod
    def fixed(cls, names: Sequence[str], numels: Sequence[int], sigma: Tensor, *, source: str) -> ScaleNet:
        """Constant scales sigma (N,), >= 0: exactly zero blocks are skipped."""
        net = cls.fresh(names, numels, hidden=1)
        kept = (sigma > 0).to(torch.float32)
        log_base = torch.where(sigma > 0, sigma, torch.ones_like(sigma)).log()
        return cls(names, net.x, log_base, kept, net.w1, net.b1, net.w2, source=source)

    def scales(self, stats: BlockStats, history: History) -> Tensor:
        """Raw scales sigma of all blocks, (N,) fp32 >= 0, on the networks' device, without a host sync.

        stats: of the unperturbed weights, (N,) each.  history: of the steps before."""
        size = (stats.mean.square() + stats.var).clamp(min=1e-24).log() / 2
        moving = torch.stack((_unit(size, -4.0, 2.0), (4 * history.progress).expand_as(size)), dim=1)
        x = torch.cat((self.x, moving), dim=1)
        # Products and sums: bf16 autocast would run a matrix product in bf16.
        hidden = torch.tanh((x[:, None, :] * self.w1).sum(dim=2) + self.b1)
        return self.kept * torch.exp(self.log_base + (hidden * self.w2).sum(dim=1))

    def select(self, names: Sequence[str]) -> ScaleNet:
        """The scales of `names`, in that order, as a copy.  Raises: InputError naming blocks that have none."""
        rows = select_rows(self.names, names, self.source, self.x.device)
        return type(self)(names, self.x[rows], self.log_base[rows], self.kept[rows], self.w1, self.b1, self.w2,
                          source=self.source)

    def skipped(self) -> tuple[str, ...]:
        """Names of the blocks whose scale is exactly zero (waits for the device)."""
        return tuple(name for name, kept in zip(self.names, self.kept.tolist(), strict=True) if not kept)


def static_inputs(names: Sequence[str], numels: Sequence[int]) -> Tensor:
    """(N, len(STATIC)) fp32: what a block is, from its name and size."""
    size = _unit(torch.tensor(numels, dtype=torch.float32).clamp(min=1).log(), 10.0, 4.0)
    depth = torch.tensor(depths(names), dtype=torch.float32)
    kinds = torch.tensor([KINDS.index(block_kind(name)) for name in names], dtype=torch.long)
    one_hot = torch.nn.functional.one_hot(kinds, len(KINDS)).to(torch.float32)
    return torch.cat((size[:, None], depth[:, None], one_hot), dim=1)


def _unit(value: Tensor, middle: float, spread: float) -> Tensor:
    """Inputs of order 1: weights have root mean squares of 1e-3 to 1, blocks 100 to 10^9 elements."""
    return (value - middle) / spread
