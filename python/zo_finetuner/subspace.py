"""Low-rank directions: the factors of what a matrix is moved by, drawn from seeds.

    one-sided    d_b = gain X_b^T V_b                   X (r, m) coordinates,  V (r, n) normal                 LOZO, ES
    two-sided    d_b = sqrt(m n) / r * U_b^T X_b^T V_b   X (r, r) coordinates,  U (r, m), V (r, n) orthonormal  SubZero

for theta_b of shape (m, n) as it is stored; entries have mean square r gain^2 and 1.  Factors are kept as their few
long rows, which matrix products take as they are.  V and U are those of a subspace, which directions of many steps may
share; sums of such directions are sums of their coordinates.  Tensors that are not matrices (norms, biases, stacked
experts) have dense noise, that of any direction: stream 0 of the direction's seed.

The noise of the factors is stream 2 at the weight's tensor id, row after row as they stand above; journals depend on
these places:

    X  elements 0 on, of the direction's seed       V  2^40 on       U  2^41 on, of the subspace's seed

so a direction and a subspace may have one seed (ES), and no order of drawing matters: an update draws the X of its
probe.  U and V of SubZero are the Q of a QR decomposition with positive diagonal of R, which is unique; its last bits
are those of the device's LAPACK.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_kernels import LOW_RANK, Blocks, draw_noise

RIGHT, LEFT = 1 << 40, 1 << 41  # where the elements of V and of U begin


class Matrix(NamedTuple):
    block: int
    tensor_id: int
    m: int
    n: int


class Other(NamedTuple):
    block: int
    tensor_id: int
    numel: int


@dataclass(frozen=True, eq=False)
class Layout:
    """The matrices among the blocks, the other blocks, and what the subspaces of the matrices are like.

    gain: of one-sided directions.  limit: the rank that may be collected, above which it is merged into the weights.
    Coordinates of all matrices lie in one flat fp32 tensor, in the order of the blocks, so that a step does with one
    operator what it would do matrix by matrix.  Raises InputError for a rank below 1, and naming a matrix whose
    smaller side is below the rank."""

    blocks: InitVar[Blocks]
    rank: int
    two_sided: bool = False
    gain: float = 1.0
    limit: int = 0
    device: torch.device = field(init=False)
    matrices: list[Matrix] = field(default_factory=list, init=False)
    others: list[Other] = field(default_factory=list, init=False)

    def __post_init__(self, blocks: Blocks) -> None:
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        object.__setattr__(self, "device", blocks.device)
        for block, (tensor, tensor_id) in enumerate(zip(blocks.tensors, blocks.ids, strict=True)):
            if tensor.dim() == 2:
                self.matrices.append(Matrix(block, tensor_id, *tensor.shape))
            else:
                self.others.append(Other(block, tensor_id, tensor.numel()))
        small = min(self.matrices, key=lambda x: min(x.m, x.n), default=None)
        if small is not None and self.rank > min(small.m, small.n):
            raise InputError(
                f"rank {self.rank} is above the smaller side of {blocks.names[small.block]} ({small.m} x "
                f"{small.n}): use rank {min(small.m, small.n)} or less, or freeze that tensor"
            )

    @cached_property
    def sizes(self) -> list[int]:
        """Coordinates of each matrix."""
        return [(self.rank if self.two_sided else x.m) * self.rank for x in self.matrices]

    @cached_property
    def gains(self) -> Tensor | None:
        """(matrices,) fp32; None for ones."""
        if not self.two_sided and self.gain == 1:
            return None
        gains = [math.sqrt(x.m * x.n) / self.rank if self.two_sided else self.gain for x in self.matrices]
        return torch.tensor(gains, dtype=torch.float32, device=self.device)

    @cached_property
    def owners(self) -> Tensor:
        """Number of the matrix, in `matrices`, that each coordinate belongs to: int64."""
        sizes = torch.tensor(self.sizes, device=self.device)
        numbers = torch.arange(len(self.sizes), device=self.device)
        return numbers.repeat_interleave(sizes, output_size=sum(self.sizes))  # told, the host need not wait for it

    @cached_property
    def places(self) -> Tensor:
        """Block numbers of the matrices: int64."""
        return torch.tensor([x.block for x in self.matrices], dtype=torch.int64, device=self.device)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of flat coordinates (..., all), (..., r, m or r) for each matrix."""
        return [x.view(*flat.shape[:-1], self.rank, -1) for x in flat.split(self.sizes, dim=-1)]

    def draw(self, seed: Tensor, scale: Tensor | None, dist: str) -> Tensor:
        """Coordinates of a direction, with its scales: flat fp32."""
        x = [draw_noise(size, seed, m.tensor_id, dist=dist, stream=LOW_RANK)
             for m, size in zip(self.matrices, self.sizes, strict=True)]
        flat = torch.cat(x) if x else torch.zeros(0, device=seed.device)
        factor = None if scale is None else scale.index_select(0, self.places)
        if self.gains is not None:
            factor = self.gains if factor is None else self.gains * factor
        return flat if factor is None else flat.mul_(factor.index_select(0, self.owners))

    def draw_others(self, seed: Tensor, scale: Tensor | None, dist: str) -> Tensor:
        """The direction of the tensors that are not matrices, with its scales: flat fp32."""
        parts = [torch.zeros(0, device=seed.device)]
        for block, tensor_id, numel in self.others:
            z = draw_noise(numel, seed, tensor_id, dist=dist)
            parts.append(z if scale is None else z * scale[block])
        return torch.cat(parts)


class Subspace:
    """right: V, (r, n) fp32, for each matrix of the layout; left: U, (r, m), or None for one-sided directions.

    lasting: it becomes others in place, so that a captured step goes on in whichever it is; what is collected in it has
    one place in memory too."""

    def __init__(self, layout: Layout, seed: Tensor, lasting: bool = False):
        self.layout, self.rank, self.lasting = layout, layout.rank, lasting
        self.right = [self._draw(x.n, seed, x.tensor_id, RIGHT) for x in layout.matrices]
        self.left = None
        if layout.two_sided:
            self.left = [_orthonormal(self._draw(x.m, seed, x.tensor_id, LEFT)) for x in layout.matrices]
            self.right = [_orthonormal(v) for v in self.right]
        self._cast: dict[torch.dtype, list[Tensor]] = {torch.float32: self.right}

    def _draw(self, length: int, seed: Tensor, tensor_id: int, start: int) -> Tensor:
        return draw_noise((self.rank, length), seed, tensor_id, start=start, stream=LOW_RANK)

    def become(self, other: Subspace) -> None:
        """Take the factors of another, in place."""
        torch._foreach_copy_(self.right, other.right)
        if self.left is not None:
            torch._foreach_copy_(self.left, other.left)
        for dtype, cast in self._cast.items():
            if dtype != torch.float32:
                torch._foreach_copy_(cast, self.right)

    def right_as(self, dtype: torch.dtype) -> list[Tensor]:
        if dtype not in self._cast:
            self._cast[dtype] = [v.to(dtype) for v in self.right]
        return self._cast[dtype]

    def left_of(self, coordinates: Tensor) -> list[Tensor]:
        """For each matrix L, (..., r, m), so that the coordinates (..., all) stand for L^T V."""
        parts = self.layout.split(coordinates)
        return parts if self.left is None else [x @ u for u, x in zip(self.left, parts, strict=True)]

    def expressed_in(self, coordinates: Tensor, new: Subspace) -> Tensor:
        """One-sided coordinates here -> in another subspace: V_new V^T X / n, since V_new V_new^T is n in the mean."""
        parts = zip(self.layout.split(coordinates), self.right, new.right, strict=True)
        return torch.cat([(w @ v.t() @ x / v.shape[1]).view(-1) for x, v, w in parts])


def _orthonormal(a: Tensor) -> Tensor:
    """The rows of a, made orthonormal in their order."""
    q, r = torch.linalg.qr(a.t())
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).t().contiguous()


@dataclass(frozen=True, eq=False)
class Held:
    """A direction whose numbers a method holds (a momentum): flat coordinates in a subspace, and flat fp32 values of
    the tensors that are not matrices."""

    subspace: Subspace
    coordinates: Tensor
    dense: Tensor
