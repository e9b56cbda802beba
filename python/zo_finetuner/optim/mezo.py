"""MeZO: zeroth-order SGD with regenerated noise (Malladi et al., arXiv 2305.17333, Algorithm 1).

    l+- = f(theta +- eps z),   g = (l+ - l-) / 2 eps,   theta -= lr g z

State: none.  Forwards per step: 2.  Deviation from the published code: the logged loss is (l+ + l-)/2, not l+.
It is the composition of all defaults, and a setting away from it are n-SPSA (`--set probes=4`), momentum and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

from zo_finetuner.optim.composed import Composed


@dataclass
class MeZO(Composed):
    name: str = "mezo"

    fixed = {"scales": "with scales it is --optimizer zo-finetuner"}
