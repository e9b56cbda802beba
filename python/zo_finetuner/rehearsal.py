"""May pairs be trusted?  Before a kind of model call is first paired, the closure is evaluated three times more.

    - poisoned    the weights of the - copies are NaN: the closure for + must not feel them
    + poisoned    the weights of the + copies are NaN: neither the closure for + nor its + half may reach the one for -

NaN spreads to whatever depends on it, so a half that takes a row, a weight or a hook's leavings from the other shows,
however small the perturbation is.  The clean losses must besides be those of two forwards, to rounding: what runs on a
batch of twice the rows may sum in another order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zo_finetuner.coverage import UncoveredWeightError
from zo_finetuner.halves import NotHalves
from zo_finetuner.optim.base import Probe
from zo_finetuner.slices import slicing

if TYPE_CHECKING:
    from zo_finetuner.paired import PairedProbing

# The errors of n roundings add up like sqrt(n): 64 are those of 8 a layer in 512 layers.
ROUNDINGS = 64


def rehearsal(
    probing: PairedProbing, pair: tuple[Probe, Probe], alone: list[Tensor], loss_fn: Callable[[], Any]
) -> str | None:
    """Why pairs cannot be evaluated together, naming the module; empty where they can.  None where nothing can be said
    since a loss of two forwards, in `alone`, is not finite.  Waits for the device."""
    plus, minus = pair
    if not torch.equal(minus.coef, -plus.coef):
        return "two probes along a direction are not +c and -c"
    if not torch.isfinite(torch.stack(alone)).all():
        return None
    for sign, want in enumerate(map(float, alone)):
        probing.poisoned = 1 - sign
        try:
            with _watched(probing, sign) as watch:
                loss = _loss(probing, plus, minus, loss_fn)
                if sign:
                    loss = _loss(probing, minus, None, loss_fn)
        except NotHalves as reason:
            return str(reason)
        except UncoveredWeightError:
            raise
        except Exception as error:
            return f"the closure fails on a batch of twice the rows ({type(error).__name__}: {error})"
        finally:
            probing.poisoned = None
            probing.restore()
        if math.isnan(loss):
            return watch.blame or "the closure's loss takes both halves from inside the model (from a hook?)"
        if abs(loss - want) > ROUNDINGS * _roundoff(probing.blocks.tensors) * max(1.0, abs(want), watch.size):
            return f"the closure's loss is {loss:.7g} in a pair and {want:.7g} alone"
    return ""


def _loss(probing: PairedProbing, probe: Probe, following: Probe | None, loss_fn: Callable[[], Any]) -> float:
    with probing.at(probe, following):
        return float(loss_fn())


class _Watch:
    """A forward hook.  blame: the first module whose clean half has a NaN.  size: of the model's outputs and its
    head's, their root mean square: roundings are relative to it, and a loss may be small where the logits are not."""

    def __init__(self, probing: PairedProbing, clean: int):
        self._probing, self._clean = probing, clean
        self._sized = (probing.model, slicing(probing.model).head)
        self.blame, self.size = "", 0.0

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if module in self._sized:
            for tensor in tensors:
                half = tensor.tensor_split(2)[self._clean] if tensor.dim() else tensor
                norm = float(torch.linalg.vector_norm(half, dtype=torch.float64))  # logits are large: no copy of them
                self.size = max(self.size, norm / math.sqrt(max(half.numel(), 1)) if math.isfinite(norm) else 0.0)
        halves = self._probing.halves
        if halves is not None and not self.blame:
            rows = [tensor for tensor in tensors if tensor.dim() and tensor.shape[0] % halves.rows == 0]
            if any(tensor.tensor_split(2)[self._clean].isnan().any() for tensor in rows):
                self.blame = f"{self._probing.describe(module)} mixes the rows of a batch"


@contextlib.contextmanager
def _watched(probing: PairedProbing, clean: int) -> Iterator[_Watch]:
    watch = _Watch(probing, clean)
    handles = [module.register_forward_hook(watch) for module in probing.model.modules()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _roundoff(weights: list[Tensor]) -> float:
    """The coarsest rounding that a forward with these weights makes: their dtypes', autocast's, TF32's."""
    kind = weights[0].device.type
    dtypes = {weight.dtype for weight in weights}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    tf32 = kind == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(2.0**-11 if tf32 else 0.0, *(torch.finfo(dtype).eps / 2 for dtype in dtypes))
