"""May a group of probes share a forward?  Before a kind of model call is first repeated, the closures are tried again.

In each round the weights of some members are NaN: the closures of the others must not feel them.  For any two members
there is a round in which one is poisoned and the other is not: two rounds for each bit of their numbers.  For a pair

    - poisoned    the closure for + must not feel the copies for -
    + poisoned    neither the closure for + nor its + half may reach the one for -

NaN spreads to whatever depends on it, so a member that takes a row, a weight or a hook's leavings from another shows,
however small the perturbation is.  The clean losses must besides be those of a forward each, to rounding: what runs on
a batch of more rows may sum in another order.
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
from zo_finetuner.members import NotMembers
from zo_finetuner.optim.base import Probe
from zo_finetuner.slices import slicing

if TYPE_CHECKING:
    from zo_finetuner.together import TogetherProbing

# The errors of n roundings add up like sqrt(n): 64 are those of 8 a layer in 512 layers.
ROUNDINGS = 64


def rehearsal(
    probing: TogetherProbing, group: list[Probe], alone: list[Tensor], loss_fn: Callable[[], Any]
) -> str | None:
    """Why a group cannot be evaluated together, naming the module; empty where it can.  None where nothing can be said
    since a loss of a forward each, at the head of `alone`, is not finite.  Waits for the device."""
    wanted = [float(loss) for loss in alone[: len(group)]]
    if not all(map(math.isfinite, wanted)):
        return None
    everybody = range(len(group))
    for bit in range((len(group) - 1).bit_length()):
        ones = frozenset(member for member in everybody if member >> bit & 1)
        for poisoned in (ones, frozenset(everybody) - ones):
            reason = _round(probing, group, wanted, poisoned, loss_fn)
            if reason:
                return reason
    return ""


def _round(
    probing: TogetherProbing, group: list[Probe], wanted: list[float], poisoned: frozenset[int],
    loss_fn: Callable[[], Any],
) -> str:  # fmt: skip
    clean = [member for member in range(len(group)) if member not in poisoned]
    probing.poisoned = poisoned
    try:
        with _watched(probing, clean) as watch:
            # Closures are evaluated in their order, up to the last that is looked at.
            losses = [_loss(probing, group[i], group[i + 1 :], loss_fn) for i in range(clean[-1] + 1)]
    except NotMembers as reason:
        return str(reason)
    except UncoveredWeightError:
        raise
    except Exception as error:
        return f"the closure fails on a batch of {len(group)} times the rows ({type(error).__name__}: {error})"
    finally:
        probing.poisoned = None
        probing.forget()
    for loss, want in ((losses[member], wanted[member]) for member in clean):
        if math.isnan(loss):
            return watch.blame or "the closure's loss takes other members from inside the model (from a hook?)"
        if abs(loss - want) > ROUNDINGS * _roundoff(probing.blocks.tensors) * max(1.0, abs(want), watch.size):
            return f"the closure's loss is {loss:.7g} among others and {want:.7g} alone"
    return ""


def _loss(probing: TogetherProbing, probe: Probe, following: list[Probe], loss_fn: Callable[[], Any]) -> float:
    with probing.at(probe, following):
        return float(loss_fn())


class _Watch:
    """A forward hook.  blame: the first module that has a NaN in a clean member's rows.  size: of the model's outputs
    and its head's, their root mean square: roundings are relative to it, and a loss may be small where the logits are
    not."""

    def __init__(self, probing: TogetherProbing, clean: list[int]):
        self._probing, self._clean = probing, clean
        self._sized = (probing.model, slicing(probing.model).head)
        self.blame, self.size = "", 0.0

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        members = self._probing.members
        if module in self._sized:
            for tensor in tensors:
                parts = [tensor] if members is None or not tensor.dim() else self._clean_of(tensor, members.count)
                for part in parts:
                    norm = float(torch.linalg.vector_norm(part, dtype=torch.float64))  # logits are large: no copy
                    if math.isfinite(norm):
                        self.size = max(self.size, norm / math.sqrt(max(part.numel(), 1)))
        if members is not None and not self.blame:
            rows = [tensor for tensor in tensors if tensor.dim() and tensor.shape[0] % members.rows == 0]
            if any(part.isnan().any() for tensor in rows for part in self._clean_of(tensor, members.count)):
                self.blame = f"{self._probing.describe(module)} mixes the rows of a batch"

    def _clean_of(self, tensor: Tensor, count: int) -> list[Tensor]:
        parts = tensor.tensor_split(count)
        return [parts[member] for member in self._clean]


@contextlib.contextmanager
def _watched(probing: TogetherProbing, clean: list[int]) -> Iterator[_Watch]:
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
