"""Probing through a scratch, both signs in one forward: + and - travel as one batch of twice the rows (`together.py`).

A module with trainable weights reads theta once, makes theta + c * scale_b * z_b and theta - c * scale_b * z_b in one
pass (one noise for both), and computes the first half of the rows with one, the second with the other.  Noise and
rounding are those of `scratch` probing, and theta is never written.

Memory: two scratch copies of the largest module, and what a doubled batch takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_finetuner.optim.base import Probe
from zo_finetuner.together import TogetherProbing


class PairedProbing(TogetherProbing):
    mode = "paired"

    def group_of(self, probes: Sequence[Probe]) -> list[Probe]:
        plus, minus = probes[0], probes[1] if len(probes) > 1 else None
        if minus is None or plus.direction is None or minus.direction is not plus.direction:
            return []
        return [_mirrored(plus, minus), minus]

    def unfit(self, group: list[Probe]) -> str:
        plus, minus = group
        return "" if torch.equal(minus.coef, -plus.coef) else "two probes along a direction are not +c and -c"

    def _write_all(self, theta: Tensor, copies: list[Tensor], block: int, rows: Tensor | None) -> None:
        self._write(theta, copies[0], block, rows, copies[1])


def _mirrored(plus: Probe, minus: Probe) -> Probe:
    """`plus`, with a coefficient of NaN if that of `minus` is not its opposite: a method that asks for something else
    than it did in the rehearsal has its step skipped, without a wait for the device."""
    return Probe(plus.direction, torch.where(minus.coef == -plus.coef, plus.coef, torch.nan))
