"""The dense form of low-rank directions, from the published places of their factors, in numpy: d_b for every block."""

from __future__ import annotations

import numpy as np
import torch

import zo_kernels as zk
from zo_kernels import Blocks


def factor(seed: int, tensor_id: int, rows: int, rank: int, start: int = 0, dist: str = "normal") -> np.ndarray:
    """(rows, rank), column after column from element `start` of stream 2 on."""
    with zk.use_backend("reference"):
        z = zk.draw_noise((rank, rows), zk.seed_tensor(seed), tensor_id, start=start, stream=2, dist=dist)
    return z.double().numpy().T


def orthonormal(a: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(a)
    return q * np.sign(np.diagonal(r))


def direction(blocks: Blocks, seed: int, subspace: int, rank: int, kind: str = "lozo") -> list[np.ndarray]:
    """kind: "lozo" U V^T, "subzero" sqrt(mn)/r U Z V^T, "es" A B^T / sqrt(r)."""
    found = []
    for tensor, tensor_id in zip(blocks.tensors, blocks.ids, strict=True):
        if tensor.dim() != 2:
            with zk.use_backend("reference"):
                found.append(zk.draw_noise(tuple(tensor.shape), zk.seed_tensor(seed), tensor_id).double().numpy())
            continue
        m, n = tensor.shape
        v = factor(subspace, tensor_id, n, rank, 2**40)
        if kind == "subzero":
            u = orthonormal(factor(subspace, tensor_id, m, rank, 2**41))
            z = factor(seed, tensor_id, rank, rank)
            found.append(np.sqrt(m * n) / rank * u @ z @ orthonormal(v).T)
        else:
            gain = rank**-0.5 if kind == "es" else 1.0
            found.append(gain * factor(seed, tensor_id, m, rank) @ v.T)
    return found


def weights(blocks: Blocks) -> list[np.ndarray]:
    return [tensor.double().numpy().copy() for tensor in blocks.tensors]


@torch.no_grad()
def put(blocks: Blocks, values: list[np.ndarray]) -> None:
    for tensor, value in zip(blocks.tensors, values, strict=True):
        tensor.copy_(torch.from_numpy(value))
