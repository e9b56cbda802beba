"""Forms of a direction: what stands in place of z in  theta + sum_k step_k z_k.

    weighted(h)       z'_kj = fl32(z_kj / fl32(sqrt(h_j)))             h > 0 a diagonal curvature                  HiZOO
    below(limit)      z'_kj = z_kj where |theta_j| <= limit, else 0    theta as it is read                   Sparse-MeZO
    shifted(mu, c)    theta + c mu + sum_k step_k z_k,                 a direction policy of mean mu               LDSD
                      beginning with acc = fma(c, mu_j, theta_j)

h and mu are tensors like theta, for an op over `Blocks` a list of them, one per block; with `rows` of a scratch they
are tensors like all of theta and take the same rows.  Nothing of them is written.  Bytes moved per element: as many
more as one of their elements has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Kind(NamedTuple):
    """What a form consists of: the names of its state tensor and of its value, "" where it has none."""

    state: str
    value: str
    per_block: bool = False  # a value for every block


KINDS = {"weighted": Kind("h", ""), "below": Kind("", "limit", per_block=True), "shifted": Kind("mu", "c")}


class Form(NamedTuple):
    """See `weighted`, `below` and `shifted`, which make them."""

    kind: str
    state: Tensor | Sequence[Tensor] | None = None
    value: Tensor | None = None

    def of(self, block: int) -> Form:
        """The form of one block, of a form for a list."""
        state = None if self.state is None else self.state[block]
        return Form(self.kind, state, self.value[block] if KINDS[self.kind].per_block else self.value)


def weighted(h: Tensor | Sequence[Tensor]) -> Form:
    """Noise divided by the square root of h: fp32, positive, shaped like theta."""
    return Form("weighted", h)


def below(limit: Tensor) -> Form:
    """Noise where |theta| <= limit only: fp32, (blocks,), 0-dim for a scratch.  A limit of infinity leaves all, a
    negative one none.  What is perturbed in place is not where it was: only a scratch can probe with it."""
    return Form("below", None, limit)


def shifted(mu: Tensor | Sequence[Tensor], c: Tensor) -> Form:
    """c * mu before the noise: mu fp32 or bf16, shaped like theta; c 0-dim fp32.  The scale of a block is the noise's
    alone."""
    return Form("shifted", mu, c)
