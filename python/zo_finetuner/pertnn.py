"""PertNN: the networks of the learned optimizer "ZO Fine-tuner" (arXiv 2510.00419), as one batch per model.

A block is a named tensor. Its network reads five numbers about the block and the step before, and returns the
scale sigma of the block's perturbation; the normaliser then makes the whole perturbation as large as MeZO's.
Nothing here reads a value on the host: a step can be queued, or captured into a CUDA graph, without a sync.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_kernels import BlockStats

#: Inputs of a network, in order. Before the first step the losses are 0 and sigma is 1.
INPUTS = ("mean", "unbiased variance", "previous loss+", "previous loss-", "previous raw sigma")

#: An embedding counts as the rows that a batch touches: the paper's code takes 15 tokens per example.
TOKENS_PER_EXAMPLE = 15


class PertNN(nn.Module):
    """`|Linear(64, 1)(tanh(Linear(5, 64)(x)))|` for each of N blocks.

    Args (the tensors become parameters, in fp32):
        names: the N blocks, as in `named_parameters()`.
        w1, b1, w2, b2: (N, hidden, 5), (N, hidden), (N, hidden), (N,), floating point.
        source: where the networks come from, for messages: a path, or e.g. "fresh, seed 0".

    Raises: InputError when a name stands twice; ValueError when shapes and names do not fit together.
    """

    def __init__(self, names: Sequence[str], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *,
                 source: str = "these networks") -> None:
        super().__init__()
        self.names = tuple(names)
        self.source = source
        if len(set(self.names)) != len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise InputError(f"{source}: two networks are named {twice}; a block has one")
        n, hidden = len(self.names), w1.shape[1] if w1.ndim == 3 else -1
        for label, tensor, shape in (("w1", w1, (n, hidden, len(INPUTS))), ("b1", b1, (n, hidden)),
                                     ("w2", w2, (n, hidden)), ("b2", b2, (n,))):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{label} has shape {tuple(tensor.shape)}; {n} networks need {shape}")
            self.register_parameter(label, nn.Parameter(tensor.detach().to(torch.float32)))

    @property
    def hidden(self) -> int:
        """Width of the hidden layer (64 in the paper)."""
        return self.w1.shape[1]

    @classmethod
    def fresh(cls, names: Sequence[str], *, hidden: int = 64, seed: int = 0) -> PertNN:
        """Untrained networks, the control for every claim about learned ones; fp32 on the CPU.

        Bit for bit what `nn.Sequential(Linear(5, hidden), Tanh(), Linear(hidden, 1))` draws for one name
        after the other under `torch.manual_seed(seed)`, but from a generator of its own.
        """
        generator = torch.Generator().manual_seed(seed)
        n = len(names)
        w1, b1 = torch.empty(n, hidden, len(INPUTS)), torch.empty(n, hidden)
        w2, b2 = torch.empty(n, hidden), torch.empty(n)
        for i in range(n):
            for weight, bias in ((w1[i], b1[i]), (w2[i:i + 1], b2[i:i + 1])):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(weight.shape[1])
                bias.uniform_(-bound, bound, generator=generator)
        return cls(names, w1, b1, w2, b2, source=f"fresh, seed {seed}")

    def forward(self, mean: Tensor, var: Tensor, loss_pos: Tensor, loss_neg: Tensor,
                sigma_prev: Tensor) -> Tensor:
        """Raw scales sigma of all blocks, (N,) fp32 >= 0, on the networks' device, without a host sync.

        Args:
            mean, var: (N,) fp32, of each block's unperturbed weights; var is unbiased (over numel - 1).
            loss_pos, loss_neg: 0-dim fp32, losses of the step before; 0 before the first step.
            sigma_prev: (N,) fp32, what this returned at the step before (raw); 1 before the first step.
        """
        x = torch.stack((mean, var, loss_pos.expand_as(mean), loss_neg.expand_as(mean), sigma_prev), dim=1)
        # Products and sums, not bmm or einsum, which bf16 autocast would run in bf16 (sigma off by 5 %) and
        # TF32 in 10 bits. At N = 772 (OPT-30B) either takes 0.5 to 0.8 ms of one CPU core.
        hidden = torch.tanh((self.w1 * x[:, None, :]).sum(dim=2) + self.b1)
        return ((self.w2 * hidden).sum(dim=1) + self.b2).abs()

    def scales(self, stats: BlockStats, history: History) -> Tensor:
        """`forward` on the statistics of the unperturbed weights and what is remembered of the step before."""
        return self(stats.mean, stats.var, history.losses[0], history.losses[1], history.sigma)

    def select(self, names: Sequence[str]) -> PertNN:
        """The networks of `names`, in that order, as a copy with its own parameters on the same device.

        Raises: InputError naming up to three blocks that have no network, and how many they are.
        """
        rows = select_rows(self.names, names, self.source, self.b2.device)
        tensors = (parameter[rows] for parameter in (self.w1, self.b1, self.w2, self.b2))
        return type(self)(names, *tensors, source=self.source)


def select_rows(known: Sequence[str], wanted: Sequence[str], source: str, device: torch.device) -> Tensor:
    """Places of `wanted` in `known`, (len(wanted),) int64.

    Raises: InputError naming up to three blocks that are not known, and how many they are.
    """
    place = {name: i for i, name in enumerate(known)}
    missing = [name for name in wanted if name not in place]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        covered = f"{len(known)} blocks such as {known[0]}" if known else "no block at all"
        raise InputError(f"{source}: no network for {', '.join(missing[:3])}{more} "
                         f"of the model's {len(wanted)} trainable blocks: it was made for {covered}; "
                         "freeze the others, or learn networks for this model")
    return torch.tensor([place[name] for name in wanted], dtype=torch.long, device=device)


def budget(names: Sequence[str], numels: Sequence[int], *, hidden_size: int, batch_size: int,
           device: torch.device | str | None = None) -> Tensor:
    """Weights c_b of the normaliser, (N,) fp64, in millions of elements (by name, as the paper's code does).

    `numel / 1e6`, but `hidden_size * 15 * batch_size / 1e6` where "embed" is part of the name: OPT's position
    embedding and a tied head count as an embedding, an untied head counts in full.
    `batch_size` is the number of examples per step of all ranks together.
    """
    touched = hidden_size * TOKENS_PER_EXAMPLE * batch_size
    elements = [touched if "embed" in name else numel for name, numel in zip(names, numels, strict=True)]
    return torch.tensor(elements, dtype=torch.float64, device=device) / 1e6


def normalizer(sigma: Tensor, c: Tensor) -> Tensor:
    """`nu = sqrt(sum c) / sqrt(sum c sigma^2)`, 0-dim fp64: `sum c (nu sigma)^2 = sum c`, as if sigma were 1.

    `nu` is 1 when every sigma is 0: a zero perturbation stays zero, where an infinite `nu` would make it NaN.
    A NaN in `sigma` stays visible in `nu`. Differentiable in `sigma`, also at zero; no host sync.

    Args: sigma (N,) raw scales, >= 0; c (N,) weights from `budget`, with a positive sum.
    """
    total, weighted = c.sum(dtype=torch.float64), (c * sigma.to(torch.float64).square()).sum()
    return (total / torch.where(weighted == 0, total, weighted)).sqrt()
