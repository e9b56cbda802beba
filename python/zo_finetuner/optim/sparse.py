"""Sparse-MeZO (Liu et al., arXiv 2402.15751): perturb and update the small weights only.

    m_j = 1 where |theta_j| <= h_b, h_b the (1 - sparsity) quantile of |theta_b| at the start
    l+- = f(theta +- eps m z),   g = (l+ - l-) / 2 eps,   theta -= lr g m z

State: a threshold per block.  Forwards per step: 2, with the estimator it is published with; it composes with all.
The mask is that of the unperturbed weights, so the same at + and - and in the update: a probe in place would read the
weights that it has moved itself, so probes go through a scratch.  A weight that grows past its threshold stops there.
Deviations: no code is published; sparsity .75 (the paper's .5 to .8).  Tensors of one dimension are not masked: norm
weights are all alike and biases start at zero, a threshold would take none of them or all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.optim.base import Part
from zo_kernels import Blocks, Form, below


@dataclass
class Everything(Part):
    """All weights take part."""

    scratch_only = ""
    whole_only = ""

    @property
    def form(self) -> Form | None:
        return None


@dataclass
class Small(Everything):
    """sparsity: share of each matrix's weights that stay."""

    sparsity: float = 0.75
    whole_only = "the limit of small weights is a quantile of a whole tensor"
    scratch_only = "the mask of small weights would be read from weights that the probe has moved"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, got {self.sparsity}: 1 leaves nothing to train")

    def start(self, blocks: Blocks) -> None:
        limits = [self._limit(name, t) for name, t in zip(blocks.names, blocks.tensors, strict=True)]
        self.memory["limit"] = torch.tensor(limits, dtype=torch.float32, device=blocks.device)
        self._form = below(self.memory["limit"])

    @property
    def form(self) -> Form:
        return self._form

    def _limit(self, name: str, theta: Tensor) -> float:
        if theta.dim() < 2 or theta.is_meta:
            return math.inf
        count = int((1 - self.sparsity) * theta.numel())
        if count < 1:
            raise InputError(f"sparsity {self.sparsity} leaves none of the {theta.numel()} weights of {name}: freeze "
                             f"it, or give a smaller --set sparsity")
        limit = theta.abs().flatten().float().kthvalue(count).values.item()
        if limit == 0:
            raise InputError(f"{name}: its smallest weights are exactly zero and would be masked once they move: "
                             f"freeze it, or use a method without a mask (LoRA's B starts at zero)")
        return limit
