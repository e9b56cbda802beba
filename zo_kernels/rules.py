"""Update rules that keep a state for every weight, in the pass that updates it: their states, numbers and equations.

With e_j = sum_k step_k z'_kj (`zo_kernels.forms`), step_k = fl32(coef_k * scale_kb), from e_j = 0 in order of k by
e_j = fma(step_k, z'_kj, e_j) (a mean first: e_j = fma(c, mu_j, 0)), and acc = fl32(theta), with decay
acc = fl32(acc * decay):

    momentum      m = fma(beta, m, e);  theta = fma(-lr, m, acc)
    adam          m = fma(b1, m, (1-b1) e);  v = fma(b2, v, (1-b2) (e e))
                  theta = acc - ((lr/c1) m) / (sqrt(v/c2) + eps)                                  Kingma & Ba 2015
    adamm         m, v as adam;  vmax = v where v > vmax;  theta = acc - (lr m) / (sqrt(vmax) + eps)   Chen et al. 2019
    sign          theta = fma(-lr, sign(e), acc)                                                   Liu et al. 2019
    sign-ema      m = fma(beta, m, (1-beta) e);  theta = fma(-lr, sign(m), acc)                    JAGUAR
    curvature     h = fma(1-a, h, (a c) ((z_0 z_0) h));  acc = fma(step_k, z_k / sqrt(h), acc) in order of k     HiZOO
    shifted-mean  acc = fma(c, mu, acc);  in order of k:  acc = fma(fl32(w_k * scale_kb), z_k, acc),
                  mu = fma(step_k, z_k, mu)                                                         LDSD

Every operation is rounded to fp32 by itself, sums and products are fused only where fma is written, and theta is
rounded to its dtype at the end.  sign(e) = (e > 0) - (e < 0), 0 for a NaN.  Adam's c = 1 - b^t is made on the device.
`shifted-mean` moves theta along some of the directions (weights w, one of them c s and the others 0 for a star) from
the mean as it was, and the mean along all of them (coefs).
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """states: names of its state tensors, one of each per block.  numbers: what the vector `numbers` holds, in order;
    `per_direction`: and then one for every direction.  forms: whether it takes a form of the directions."""

    states: tuple[str, ...]
    numbers: tuple[str, ...]
    forms: bool = True
    per_direction: bool = False


RULES = {
    "momentum": Rule(("m",), ("lr", "beta")),
    "adam": Rule(("m", "v"), ("lr", "b1", "b2", "eps", "c1", "c2")),
    "adamm": Rule(("m", "v", "vmax"), ("lr", "b1", "b2", "eps")),
    "sign": Rule((), ("lr",)),
    "sign-ema": Rule(("m",), ("lr", "beta")),
    "curvature": Rule(("h",), ("a", "c"), forms=False),
    "shifted-mean": Rule(("mu",), ("c",), forms=False, per_direction=True),
}
