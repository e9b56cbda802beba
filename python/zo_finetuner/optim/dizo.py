"""DiZO (divergence-driven zeroth-order): MeZO, and now and then a projection of how far some layers have gone.

    after `period` steps of MeZO, `rounds` steps, each on its own batch and for all projected tensors b at once:
    t_b = |theta_b - theta0_b|,  z_b normal, clipped to +- tau t_b / reach,
    f+- = f(theta0_b + (gamma_b +- reach z_b) / t_b (theta_b - theta0_b)),  g = (f+ - f-) / 2 reach
    gamma_b <- gamma_b - step t_b g z_b, clipped to (1 +- tau) t_b          (gamma_b = t_b before the first round)
    after the last  theta_b <- theta0_b + gamma_b / t_b (theta_b - theta0_b)

State: theta0 of the projected tensors, at most 1 P in their dtype; the factors are applied while a probe is made, so
theta is not touched before the last round.  Forwards per step: 2, projection steps too.  Source: DiZO's code (period
50, 10 rounds, step 2, tau .2, reach .1, tensors k_proj and v_proj).  Deviations: embeddings train unless they are
frozen; the learning rate's schedule counts projection steps as steps; weight decay rests in them; scratch probing only;
a last round whose loss is not finite leaves theta where it was.
It takes any scale policy, estimator and rule for the steps in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_finetuner.errors import InputError, require_positive
from zo_finetuner.optim.base import Probe, Slope, StepContext, Update
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.directions import Anchored
from zo_finetuner.optim.state import require_room
from zo_kernels import Blocks, draw_noise


@dataclass
class DiZO(Composed):
    """project: names of the projected tensors contain one of these, separated by commas.  project_step: of gamma."""

    name: str = "dizo"
    project: str = "k_proj,v_proj"
    period: int = 50
    rounds: int = 10
    project_step: float = 2.0
    tau: float = 0.2
    reach: float = 0.1

    whole_only = "it measures how far whole tensors have gone"
    scratch_only = "a projection's probe cannot be undone exactly"
    uniform = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("period", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("project_step", "reach"):
            require_positive(name, getattr(self, name))
        if not 0 < self.tau < 1:
            raise InputError(f"tau must be between 0 and 1, got {self.tau}")

    def start(self, blocks: Blocks) -> None:
        super().start(blocks)
        parts = [part.strip() for part in self.project.split(",") if part.strip()]
        chosen = [any(part in name for part in parts) for name in blocks.names]
        if not any(chosen):
            raise InputError(f'no trainable tensor has "{self.project}" in its name ({blocks.names[0]} is one): give '
                             f"--set project=NAME,NAME")
        size = sum(t.nbytes for t, is_chosen in zip(blocks.tensors, chosen, strict=True) if is_chosen)
        require_room(blocks.device, size, f"{self.name} (the weights to start from)")
        self._tensors = blocks.tensors
        self._anchors = [t.clone() if own else None for t, own in zip(blocks.tensors, chosen, strict=True)]
        self.states["anchor"] = [anchor for anchor in self._anchors if anchor is not None]
        self.memory["gamma"] = torch.ones(len(blocks), dtype=torch.float32, device=blocks.device)

    def ask(self, context: StepContext) -> list[Probe] | list[Slope]:
        self._round = context.step % (self.period + self.rounds) - self.period
        if self._round < 0:
            return super().ask(context)
        length = self._lengths()
        if self._round == 0:
            self.memory["gamma"].copy_(length)
        bound = self.tau / self.reach * length
        z = draw_noise(len(length), context.seed(0), 0).clamp(-bound, bound)
        inverse = torch.where(length > 0, 1 / length, 0.0)
        ratio = torch.where(length > 0, self.memory["gamma"] * inverse, 1.0)
        self._length, self._z = length, z
        probed = Anchored(self._anchors, ratio, z * inverse)
        return [Probe(probed, context.eps.new_full((), sign * self.reach)) for sign in (1, -1)]

    def tell(self, losses: Tensor) -> Update | list[Probe]:
        if self._round < 0:
            return super().tell(losses)
        g = (losses[0] - losses[1]) / (2 * self.reach)
        length, gamma = self._length, self.memory["gamma"]
        moved = gamma - self.project_step * length * g * self._z
        gamma.copy_(moved.clamp((1 - self.tau) * length, (1 + self.tau) * length))
        anchored = None
        if self._round == self.rounds - 1:
            ratio = torch.where(length > 0, gamma / length, 1.0)
            anchored = Anchored(self._anchors, ratio, torch.zeros_like(ratio))
        return Update([], losses.mean(), g, anchored=anchored)

    def _lengths(self) -> Tensor:
        """|theta_b - theta0_b|, 0 where nothing is projected: (blocks,) fp32."""
        zero = torch.zeros((), dtype=torch.float32, device=self.memory["gamma"].device)
        pairs = zip(self._tensors, self._anchors, strict=True)
        gone = [zero if a is None else torch.linalg.vector_norm(t.float() - a.float()) for t, a in pairs]
        return torch.stack([length.to(zero.device) for length in gone])
