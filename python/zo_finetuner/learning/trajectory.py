"""How the base model moves between meta steps of the paper's recipe: SGD, momentum .8, gradient clipped to norm 1.

Memory besides the backward: the momentum, as large as the weights.  The clipping norm is known only after a whole
backward: either the gradients are kept until then (as large as the weights again, one backward), or a first backward
measures the norm and a second one applies the step, one gradient at a time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import set_seed

from zo_finetuner.learning.streaming import LossFn, Weights

KEEP_BELOW = 100_000_000  # elements: 0.4 GB of gradients are kept, more cost a second backward


class SGDTrajectory:
    """SGD as the paper moves its base model.  keep_gradients: None decides by size (`KEEP_BELOW`)."""

    def __init__(
        self, weights: Weights, *, momentum: float = 0.8, max_norm: float = 1.0, keep_gradients: bool | None = None
    ):
        self.weights, self.momentum, self.max_norm = weights, momentum, max_norm
        small = sum(weights.blocks.numels) <= KEEP_BELOW
        self.keep_gradients = small if keep_gradients is None else keep_gradients
        self._buffers: list[Tensor | None] = [None] * len(weights.parameters)

    def restart(self) -> None:
        """Forget the momentum."""
        self._buffers = [None] * len(self.weights.parameters)

    def step(self, loss_fn: LossFn, lr: float, seed: int) -> Tensor:
        """One step at this rate, with dropout as in training (masks from `seed`); returns the loss (0-dim)."""
        model = self.weights.model
        model.train()
        try:
            return self._kept(loss_fn, lr, seed) if self.keep_gradients else self._streamed(loss_fn, lr, seed)
        finally:
            model.eval()

    def _kept(self, loss_fn: LossFn, lr: float, seed: int) -> Tensor:
        held: dict[int, Tensor] = {}
        loss = _loss(loss_fn, seed)
        self.weights.backward(loss, lambda blocks, gradients: held.update(zip(blocks, gradients, strict=True)))
        clip = self._clip(torch._foreach_norm(list(held.values())))
        while held:
            block, gradient = held.popitem()
            self._move(clip, lr, [block], [gradient])
        return loss.detach()

    def _streamed(self, loss_fn: LossFn, lr: float, seed: int) -> Tensor:
        norms: list[Tensor] = []
        self.weights.backward(_loss(loss_fn, seed), lambda _, gradients: norms.extend(torch._foreach_norm(gradients)))
        clip = self._clip(norms)
        loss = _loss(loss_fn, seed)
        self.weights.backward(loss, partial(self._move, clip, lr))
        return loss.detach()

    def _clip(self, norms: list[Tensor]) -> Tensor:
        total = torch.linalg.vector_norm(torch.stack(norms))
        return (self.max_norm / (total + 1e-6)).clamp(max=1.0)  # 1e-6: as torch clips

    @torch.no_grad()
    def _move(self, clip: Tensor, lr: float, blocks: list[int], gradients: list[Tensor]) -> None:
        for block, gradient in zip(blocks, gradients, strict=True):
            gradient.mul_(clip)
            buffer = self._buffers[block]
            if self.momentum == 0:
                buffer = gradient
            elif buffer is None:
                self._buffers[block] = buffer = gradient  # the gradient becomes the momentum: no copy
            else:
                buffer.mul_(self.momentum).add_(gradient)
            self.weights.parameters[block].data.add_(buffer, alpha=-lr)


def _loss(loss_fn: LossFn, seed: int) -> Tensor:
    set_seed(seed & 0xFFFFFFFF)
    return loss_fn()
