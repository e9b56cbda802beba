"""What changes from step to step without the device having a say: the learning rate and the seeds of the directions.

Both lie in device memory at the same addresses in every step, so kernels (and CUDA graphs) read them there, and the
host sends them without waiting: from pinned memory, which torch's allocator keeps until the copy is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels import ROUNDING_PROBE, derive_seed, seed_tensor


class StepInputs:
    """lr: 0-dim fp32.  seeds: of directions 0, 1, ... of the step, 0-dim int64 each; rounding: the step's rounding
    seed, likewise.  All are views that hold until the next `fill`: what a method keeps for longer it clones."""

    def __init__(self, directions: int, device: torch.device):
        self.lr = torch.zeros((), dtype=torch.float32, device=device)
        self._all = torch.zeros(directions + 1, dtype=torch.int64, device=device)
        *self.seeds, self.rounding = self._all.unbind()

    def fill(self, lr: float | Tensor, run_seed: int, step: int) -> None:
        """Send those of a step (seeds by the noise contract); no wait for the device."""
        probes = (*range(len(self.seeds)), ROUNDING_PROBE)
        _send(self._all, seed_tensor(derive_seed(run_seed, step, probe) for probe in probes))
        _send(self.lr, lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float32))


def _send(target: Tensor, values: Tensor) -> None:
    if target.device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)
