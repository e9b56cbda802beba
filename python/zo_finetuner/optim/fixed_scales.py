"""Constant scales per block: the honest controls of a learned optimizer.

    l+- = f(theta +- eps s_b z_b),   g = (l+ - l-) / 2 eps,   theta_b -= lr g s_b z_b

    sigma-one     s_b = 1: the normaliser of equal scales is 1, so this is MeZO bit for bit, on the code path of scales
    closed-form   s_b^2 proportional to (||gradient_b||^2 / numel_b)^p, measured beforehand by a few backward passes
                  (`learning/closed_form.py`), normalised as the paper normalises its own: sum c_b s_b^2 = sum c_b

State: the scales.  Forwards per step: 2.  The scales are rounded to fp16, as a journal holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zo_finetuner.optim.composed import Composed


@dataclass
class FixedScales(Composed):
    """scales: `Constant`."""

    name: str = "closed-form"

    @property
    def scale(self) -> Tensor:
        """(blocks,) fp32."""
        return self.scales.fixed


@dataclass
class SigmaOne(FixedScales):
    name: str = "sigma-one"

    fixed = {"scales": "all its scales are one"}
