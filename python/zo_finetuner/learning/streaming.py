"""The base model's weights during learning: moved in place and back, gradients taken one at a time.

    theta' = theta + coef * scale_b * z_b      perturb_, 8 bytes moved per fp32 element; the same pass back afterwards
    backward                                   gradients go to a visitor as soon as they are whole, and are freed

There is no copy of the model and no stored noise.  On top of the weights a backward needs

    activations + 9/8 of the largest gradient + a tied embedding's gradient

(an eighth: small gradients wait for each other, so that one kernel call takes many of them; autograd holds what a tied
embedding's gradient has from the head until the embedding's own part comes).

The way back restores an element exactly unless theta' lies in a larger binade than theta, where it may be off by one
rounding of theta', 2^-24 |theta'| at most; a window of learning ends by loading the base weights again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_finetuner.params import trainable_blocks
from zo_kernels import Blocks, BlockStats, block_stats, dot_noise, perturb_

Visit = Callable[[list[int], list[Tensor]], None]
LossFn = Callable[[], Tensor]


@dataclass(frozen=True)
class Turn:
    """One batch's turn in learning.  loss_fn: () -> differentiable loss (0-dim) on the batch at the weights as they
    are.  task: which learning set.  history: what its policy remembers.  place: of the step in its window, from 0 to
    below 1.  slower: factor on the trajectory's rate.  few_answers: the set's (`sources.py`)."""

    loss_fn: LossFn
    task: int
    history: History
    seed: int
    place: float
    slower: float = 1.0
    few_answers: bool = False


class Weights:
    """The trainable parameters of a model, in fp32.

    Raises InputError for a quantised model, for what `trainable_blocks` refuses, and for a trainable tensor that is
    not fp32."""

    def __init__(self, model: nn.Module):
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            raise InputError("the base model is quantised: learning needs its unquantised checkpoint")
        self.model, self.blocks = model, trainable_blocks(model)
        named = dict(model.named_parameters())
        self.parameters: list[nn.Parameter] = [named[name] for name in self.blocks.names]
        for name, parameter in zip(self.blocks.names, self.parameters, strict=True):
            if parameter.dtype != torch.float32:
                kind = str(parameter.dtype).removeprefix("torch.")
                raise InputError(f"{name} is {kind}: learning needs fp32 weights; load the model in float32")
        self.device = self.blocks.device
        self._waiting = max(p.nbytes for p in self.parameters) // 8

    def stats(self) -> BlockStats:
        """Statistics of the weights as they are."""
        return block_stats(self.blocks)

    @contextlib.contextmanager
    def displaced(
        self, seed: Tensor, coef: Tensor, scale: Tensor | None = None, dist: str = "normal"
    ) -> Iterator[None]:
        """Inside, theta_b + coef * scale_b * z_b in place; undone afterwards, whatever happened.

        seed: 0-dim int64; coef: 0-dim fp32; scale: (blocks,) fp32 or None for ones."""
        perturb_(self.blocks, seed, coef, scale, dist=dist)
        try:
            yield
        finally:
            perturb_(self.blocks, seed, -coef, scale, dist=dist)

    def backward(self, loss: Tensor, visit: Visit) -> None:
        """`visit(blocks, gradients)`, several times, for every block that the loss depends on, once autograd has summed
        its gradient over all uses (a tied tensor: once).  The gradients are the visitor's to change and are freed
        afterwards; it may write the blocks' weights, which nothing of this backward reads any more."""
        held: dict[int, Tensor] = {}

        def give() -> None:
            with torch.no_grad():
                visit(list(held), list(held.values()))
            held.clear()

        def take(block: int, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            held[block] = gradient.to_dense() if gradient.is_sparse else gradient
            if sum(g.nbytes for g in held.values()) > self._waiting:
                del gradient
                give()

        handles = [p.register_post_accumulate_grad_hook(partial(take, i)) for i, p in enumerate(self.parameters)]
        try:
            loss.backward()
            if held:
                give()
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self.parameters:
                parameter.grad = None


class NoiseDots:
    """A visitor: `dots` (K, blocks) = <gradient_b, z_kb> of K seeds and `energy` (blocks,) = ||gradient_b||^2, in fp32,
    from one read of each gradient; 0 where a block has no gradient."""

    def __init__(self, blocks: Blocks, seeds: Tensor, dist: str = "normal"):
        self._blocks, self._seeds, self._dist = blocks, seeds, dist
        self.dots = torch.zeros(seeds.shape[0], len(blocks), dtype=torch.float32, device=blocks.device)
        self.energy = torch.zeros(len(blocks), dtype=torch.float32, device=blocks.device)

    def __call__(self, blocks: list[int], gradients: list[Tensor]) -> None:
        names = [self._blocks.names[b] for b in blocks]
        few = Blocks(
            ((name, gradient.contiguous()) for name, gradient in zip(names, gradients, strict=True)),
            ids={name: self._blocks.ids[b] for name, b in zip(names, blocks, strict=True)},
        )
        dots, stats = dot_noise(few, self._seeds, dist=self._dist, stats=True)
        places = torch.tensor(blocks, device=self.dots.device)
        self.dots[:, places] = dots
        self.energy[places] = stats.norm.square()
