"""The published recipe of learning to learn (arXiv 2510.00419, single- and multi-dataset), without its copies.

    sigma   = PertNN(phi; statistics of theta, losses and sigma of the step before)
    scale   = nu * sigma,  nu detached          l+- = f(theta +- eps * scale * z),  s = (l+ - l-) / 2 eps, detached
    theta'  = theta - lr_update * s * nu * sigma(phi) * z,   meta loss f(theta') on the same batch
    dL/dsigma_b = -lr_update * s * nu * <gradient_b(theta'), z_b>            one number per block; then SGD on phi

The published code builds theta' as graph tensors (a second model and the noise are held); the last line needs neither.
It is the same derivative: theta' depends on sigma_b through that one product.
Deviation: none in the numbers but fp32 rounding (tests/test_learning_golden.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_finetuner.history import History
from zo_finetuner.learning.streaming import LossFn, NoiseDots, Turn, Weights
from zo_finetuner.learning.trajectory import SGDTrajectory
from zo_finetuner.pertnn import PertNN, normalizer
from zo_kernels import perturb_, seed_tensor


@dataclass(frozen=True)
class MetaStep:
    """What one meta step saw, 0-dim fp32: the losses at +-eps, the meta loss; scale is (blocks,) fp32."""

    losses: Tensor
    meta_loss: Tensor
    projected_grad: Tensor
    norm: Tensor
    scale: Tensor


class PaperRecipe:
    """nets: fp32, for the blocks of `weights`, in their order.  share: c_b of the normaliser (blocks,), or None."""

    name = "paper"

    def __init__(
        self, weights: Weights, nets: PertNN, share: Tensor | None, trajectory: SGDTrajectory, *,
        lr_mlp: float, lr_update: float = 1e-6, lr_llm: float = 1e-2, eps: float = 1e-3, zeroth_order: bool = False,
    ):  # fmt: skip
        self.weights, self.nets, self.share, self.trajectory = weights, nets, share, trajectory
        self.lr_update, self.lr_llm, self.zeroth_order = lr_update, lr_llm, zeroth_order
        self.eps = torch.tensor(eps, dtype=torch.float32, device=weights.device)
        self.optimizer = torch.optim.SGD(nets.parameters(), lr=lr_mlp)

    def restart(self) -> None:
        """The base model has been put back to its own weights."""
        self.trajectory.restart()

    def step(self, turn: Turn) -> Tensor:
        """A meta step and a step of the trajectory on one batch; returns the batch's loss, 0-dim."""
        seen = self.meta_step(turn.loss_fn, turn.history, turn.seed)
        self.update()
        lr = self.lr_llm * turn.slower * (1 - turn.place)  # to 0 over a window
        if self.zeroth_order:
            at = seed_tensor(turn.seed, self.weights.device)
            perturb_(self.weights.blocks, at, -lr * seen.projected_grad, seen.scale)
            return seen.losses.mean()
        return self.trajectory.step(turn.loss_fn, lr, turn.seed)

    def meta_step(self, loss_fn: LossFn, history: History, seed: int) -> MetaStep:
        """Leaves d meta loss / d phi in the gradients of `nets`, and theta as it was; `history` moves on."""
        at = seed_tensor(seed, self.weights.device)
        sigma = self.nets.scales(self.weights.stats(), history)
        with torch.no_grad():
            norm = torch.ones_like(sigma[0]) if self.share is None else normalizer(sigma, self.share)
            scale = (norm * sigma).float()
            losses = []
            for eps in (self.eps, -self.eps):
                with self.weights.displaced(at, eps, scale):
                    losses.append(loss_fn())
            losses = torch.stack(losses).float()
            projected_grad = (losses[0] - losses[1]) / (2 * self.eps)
        dots = NoiseDots(self.weights.blocks, at.reshape(1))
        with self.weights.displaced(at, -self.lr_update * projected_grad, scale):
            meta_loss = loss_fn()
            self.weights.backward(meta_loss, dots)
        self.optimizer.zero_grad()
        sigma.backward(((-self.lr_update * projected_grad * norm) * dots.dots[0]).float())
        history.sigma = sigma.detach()
        history.remember(losses)
        return MetaStep(losses, meta_loss.detach(), projected_grad, norm, scale)

    def update(self) -> None:
        """SGD on phi; a gradient that is not finite (fp overflow at theta') leaves phi alone."""
        if all(parameter.grad.isfinite().all() for parameter in self.nets.parameters()):
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])
