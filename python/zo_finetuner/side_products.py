"""Side products: what a module would return if its weight were W + L^T R, from what it returned for W.

    linear      y = x W^T + (x R^T) L
    Conv1D      y = x W + (x L^T) R              (GPT-2 keeps its weights transposed)
    embedding   y = W[tokens] + L[:, tokens]^T R (times the embedding's own factor, where it has one: Gemma)

L (k, m) and R (k, n) for a W of (m, n): a tied weight has one L and one R, for its embedding and its head.  A product
is added in place to a y that the module has just made; of a head that computes some rows of its weight
(`rows.head_rows`), those.  The rows of x and y are those of N members, one behind the other; L is (N, k, m), and R
(N, k, n) or, one for all, (k, n).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SideProduct = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None]  # module, x, y, L, R


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


def _linear(module: nn.Module, x: Tensor, y: Tensor, left: Tensor, right: Tensor) -> None:
    rows = module.__dict__.get("_zo_rows")
    _add(y, x, right, left if rows is None else left.index_select(2, rows))


def _transposed(module: nn.Module, x: Tensor, y: Tensor, left: Tensor, right: Tensor) -> None:
    _add(y, x, left, right if right.dim() == 3 else right.expand(left.shape[0], -1, -1))


def _embedding(module: nn.Module, tokens: Tensor, y: Tensor, left: Tensor, right: Tensor) -> None:
    _add_rows(y, _looked_up(left, tokens), right)


def _scaled_embedding(module: nn.Module, tokens: Tensor, y: Tensor, left: Tensor, right: Tensor) -> None:
    _add_rows(y, _looked_up(left, tokens) * module.embed_scale.to(left.dtype), right)


def _looked_up(left: Tensor, tokens: Tensor) -> Tensor:
    """(N, rows of one, k)"""
    ids = tokens.reshape(left.shape[0], -1)
    if len(ids) == 1:
        return left.index_select(2, ids[0]).transpose(1, 2)
    rows = [own.index_select(1, places) for own, places in zip(left, ids, strict=True)]
    return torch.stack(rows).transpose(1, 2)


def _add(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor) -> None:
    """y += (x inner^T) outer: x as it lies first, which leaves rows of k for the second (on a CPU half the time of the
    transposed order)."""
    if y.dtype != inner.dtype or y.dtype != x.dtype:  # under autocast y has another dtype than the weight
        x, inner = x.to(y.dtype), inner.to(y.dtype)
    count, width = outer.shape[0], x.shape[-1]
    if inner.dim() == 2 or count == 1:
        thin = torch.mm(x.reshape(-1, width), inner.view(-1, width).t()).view(count, -1, inner.shape[-2])
    else:
        thin = torch.bmm(x.reshape(count, -1, width), inner.transpose(1, 2))
    _add_rows(y, thin, outer)


def _add_rows(y: Tensor, thin: Tensor, outer: Tensor) -> None:
    """y += thin outer for each member; thin: (N, rows of one, k)."""
    if y.dtype != outer.dtype or y.dtype != thin.dtype:
        thin, outer = thin.to(y.dtype), outer.to(y.dtype)
    count = thin.shape[0]
    if count == 1:
        y.view(-1, y.shape[-1]).addmm_(thin[0], outer if outer.dim() == 2 else outer[0])
        return
    outer = outer if outer.dim() == 3 else outer.expand(count, -1, -1)
    y.view(count, -1, y.shape[-1]).baddbmm_(thin, outer)
