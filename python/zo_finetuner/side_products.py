"""Side products: what a module would return if its weight were W + L^T R, from what it returned for W.

    linear      y = x W^T + (x R^T) L
    Conv1D      y = x W + (x L^T) R              (GPT-2 keeps its weights transposed)
    embedding   y = W[tokens] + L[:, tokens]^T R (times the embedding's own factor, where it has one: Gemma)

L (k, m) and R (k, n) for a W of (m, n): a tied weight has one L and one R, for its embedding and its head.  A product
is added in place to a y that the module has just made; of a head that computes some rows of its weight
(`rows.head_rows`), those.  The rows of x and y may be those of several members, one behind the other, each with its own
L and R: x W^T is one product for all of them, and so is x R^T for neighbours that have one R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Sides(NamedTuple):
    """left: L, right: R of a member."""

    left: Tensor
    right: Tensor


SideProduct = Callable[[nn.Module, Tensor, Tensor, Sequence[Sides]], None]  # module, x, y, a pair for each member


def side_product(module: nn.Module) -> SideProduct | None:
    """That of a module's weight; None where its forward is not one of the three."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _linear
    if forward is Conv1D.forward:
        return _transposed
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        if forward is nn.Embedding.forward:
            return _embedding
        if type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale"):
            return _scaled_embedding
    return None


def _linear(module: nn.Module, x: Tensor, y: Tensor, sides: Sequence[Sides]) -> None:
    rows = module.__dict__.get("_zo_rows")
    lefts = [s.left if rows is None else s.left.index_select(1, rows) for s in sides]
    _add(y, x, [s.right for s in sides], lefts)


def _transposed(module: nn.Module, x: Tensor, y: Tensor, sides: Sequence[Sides]) -> None:
    _add(y, x, [s.left for s in sides], [s.right for s in sides])


def _embedding(
    module: nn.Module, tokens: Tensor, y: Tensor, sides: Sequence[Sides], scale: Tensor | None = None
) -> None:
    ids = tokens.reshape(len(sides), -1)
    for number, (left, right) in enumerate(sides):
        thin = left.index_select(1, ids[number])
        _add_rows(_rows(y, len(sides))[number], thin if scale is None else thin * scale.to(thin.dtype), right)


def _scaled_embedding(module: nn.Module, tokens: Tensor, y: Tensor, sides: Sequence[Sides]) -> None:
    _embedding(module, tokens, y, sides, module.embed_scale)


def _add(y: Tensor, x: Tensor, inner: list[Tensor], outer: list[Tensor]) -> None:
    """y += (x inner^T) outer, in the order that takes least time on a CPU (by a fifth): thin^T times long."""
    x = x.to(y.dtype).reshape(len(outer), -1, x.shape[-1])  # under autocast y has another dtype than the weight
    out, start = _rows(y, len(outer)), 0
    while start < len(outer):
        end = _end(inner, start)
        thin = torch.mm(inner[start].to(y.dtype), x[start:end].reshape(-1, x.shape[-1]).t())
        for number, own in enumerate(thin.tensor_split(end - start, dim=1), start):
            _add_rows(out[number], own, outer[number])
        start = end


def _end(values: list[Tensor], start: int) -> int:
    """Of the run of one tensor that begins there."""
    end = start + 1
    while end < len(values) and values[end] is values[start]:
        end += 1
    return end


def _rows(y: Tensor, members: int) -> Tensor:
    """(members, rows of one, width), a view."""
    return y.view(members, -1, y.shape[-1])


def _add_rows(y: Tensor, thin: Tensor, outer: Tensor) -> None:
    """y += thin^T outer; thin: (k, rows of y)."""
    y.addmm_(thin.t().to(y.dtype), outer.to(y.dtype))
