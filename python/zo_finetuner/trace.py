"""What one evaluation of the loss costs, from shapes alone: the model's own forward runs on meta tensors.

    bytes   every new storage is counted when an operator returns it and discounted when Python lets it go, so the peak
            is that of the real forward, temporaries and masks included, for any architecture
    flops   2 per multiply-add of the matrix products and of attention

Attention is counted as a fused kernel (output and log-sum-exp), which is what torch runs on a CPU or a GPU; on meta
tensors torch itself would spell out all scores.  What an operator allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from zo_finetuner.errors import InputError
from zo_finetuner.objective import training_loss
from zo_finetuner.optim.base import Direction, Probe
from zo_finetuner.paired import PairedProbing
from zo_finetuner.rows import output_head
from zo_finetuner.scratch import ScratchProbing
from zo_finetuner.slices import slicing
from zo_kernels import Blocks

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Bytes, besides weights, batch and scratch.  body: largest sum of tensors alive before the head of a forward runs;
    logits: the same from the head on; kept: alive at the end, with the loss.  traffic: read and written by operators
    that are no matrix product.  flops; operators: how many compute something."""

    body: int
    logits: int
    kept: int
    traffic: int
    flops: int
    operators: int

    @property
    def peak(self) -> int:
        return max(self.body, self.logits)


@dataclass(frozen=True)
class ProbedCost:
    """Probes through a scratch.  first: bytes of the first step, its growing scratch included.  later: of the others,
    of one forward.  scratch: bytes that it has grown to.  written: bytes of perturbed copies made in a forward, one
    sign.  largest: the tensor that needs most of the scratch."""

    first: int
    later: Cost
    scratch: int
    written: int
    largest: str


def trace_loss(model: nn.Module, batch: Batch, *, gradients: bool = False, loss: Callable = training_loss) -> Cost:
    """The cost of `loss(model, batch)`, both on the meta device.  gradients: as first-order training evaluates it, so
    that `kept` is what the forward stores for the backward (no checkpoint is recomputed)."""
    with counted(model, batch) as tally, torch.set_grad_enabled(gradients):
        result = loss(model, batch)
        cost = tally.cost()
    del result
    return cost


@torch.no_grad()
def trace_probes(
    model: nn.Module, blocks: Blocks, batch: Batch, mode: str, loss: Callable = training_loss
) -> ProbedCost:
    """The cost of a forward of probes by the engine's own probing, mode "scratch" (one sign, the other is the same) or
    "paired" (both)."""
    probing = SHAPES[mode](model, blocks)
    direction = Direction(torch.empty((), dtype=torch.int64, device="meta"))
    coef = torch.empty((), device="meta")
    plus, minus = Probe(direction, coef), Probe(direction, -coef)
    with counted(model, batch) as tally:
        for _ in range(2 if mode == "paired" else 1):  # pairs are made once they are trusted
            _evaluate(probing, plus, minus, lambda: loss(model, batch))
            probing.rehearse([], [], loss)
        first, scratch = tally.cost().peak, tally.alive
        tally.restart()
        probing.written = 0
        _evaluate(probing, plus, minus, lambda: loss(model, batch))
    return ProbedCost(first, tally.cost(), scratch, probing.written, probing.largest[1])


@contextlib.contextmanager
def counted(model: nn.Module, batch: Batch) -> Iterator[Tally]:
    """A tally that begins once it is known whether the head is read in slices, which is tried before a first step."""
    with Tally(model, batch) as tally:
        slicing(model)
        tally.restart()
        yield tally


def _evaluate(probing: ScratchProbing, plus: Probe, minus: Probe, loss: Callable) -> None:
    with probing.at(plus, [minus]):
        loss()
    if probing.mode == "paired":  # the - half is alive until its closure has taken it
        with probing.at(minus):
            loss()


class _ShapesOnly:
    """A probing of a meta model: the kernels are not called, and what they would write is added up."""

    written, largest = 0, (0, "")

    def _write(self, theta: Tensor, out: Tensor, block: int, *_: Tensor | None) -> None:
        self.written += out.nbytes
        if out.nbytes > self.largest[0]:
            self.largest = (out.nbytes, self.blocks.names[block])


class ScratchShapes(_ShapesOnly, ScratchProbing):
    pass


class PairedShapes(_ShapesOnly, PairedProbing):
    def rehearse(self, *_: object) -> None:
        self._trusted |= self._met  # there are no values to compare

    def tell(self, reason: str) -> None:
        raise InputError(f"paired probing would take two forwards ({reason}): plan it as scratch probing")


SHAPES = {"scratch": ScratchShapes, "paired": PairedShapes}


class Tally(TorchDispatchMode):
    """Within it the storages that operators make are counted, weights and batch aside.  alive: bytes of them."""

    def __init__(self, model: nn.Module, batch: Batch):
        super().__init__()
        self.alive = 0
        own = (*model.parameters(), *model.buffers(), *batch.values())
        self._own = [t.untyped_storage() for t in own]  # held: an id names a storage while it lives
        self._known = {id(storage) for storage in self._own}
        self._model = model
        self.restart()

    def restart(self) -> int:
        """Begin again, with what is alive as the ground that costs are above; its bytes."""
        self._ground = self.alive
        self.traffic = self.flops = self.operators = 0
        self._peaks = {"body": self.alive, "logits": self.alive}
        self._part = "body"
        return self._ground

    def cost(self) -> Cost:
        body, logits = (peak - self._ground for peak in self._peaks.values())
        return Cost(body, logits, self.alive - self._ground, self.traffic, self.flops, self.operators)

    def __enter__(self) -> Tally:
        self._exits = contextlib.ExitStack()
        head = output_head(self._model)
        for module, part in ((self._model, "body"), (head, "logits")):
            if module is not None:
                enter = functools.partial(self._begin, part)
                self._exits.enter_context(module.register_forward_pre_hook(enter, prepend=True))
        self._exits.enter_context(FusedAttention(self))
        self._exits.enter_context(_autocast_off_for_meta())
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._exits.close()

    def _begin(self, part: str, *_: object) -> None:
        self._part = part
        self._peaks[part] = max(self._peaks[part], self.alive)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ANSWERS:
            return ANSWERS[func]
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._count(tensor.untyped_storage())
        works = not func.is_view and func._overloadpacket not in IDLE
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        elif func._overloadpacket in LOOKUPS:
            self.traffic += 2 * out.nbytes
        elif works:
            self.traffic += sum(tensor.nbytes for tensor in _tensors((args, kwargs, out)))
        self.operators += works
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self.alive += storage.nbytes()
            self._peaks[self._part] = max(self._peaks[self._part], self.alive)
            weakref.finalize(storage, self._discount, id(storage), storage.nbytes())

    def _discount(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.alive -= size


IDLE = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like, torch.ops.aten._unsafe_view}
LOOKUPS = {torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather}  # read as much as they write
# What an operator that reads values is answered: "is nothing padded?" no; "is this mask the one of before?" yes.
ANSWERS = {torch.ops.aten._local_scalar_dense.default: False, torch.ops.aten.equal.default: True}


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _autocast_off_for_meta() -> Iterator[None]:
    """Models and probing ask by device type, and torch has no answer for meta but an error."""
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *kind: kind != ("meta",) and asked(*kind)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


class FusedAttention(TorchFunctionMode):
    """Stands in for `scaled_dot_product_attention`: what a fused kernel allocates, and its products."""

    def __init__(self, tally: Tally):
        super().__init__()
        self._tally = tally

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.new_empty(attn_mask.shape, dtype=query.dtype)  # torch turns it into a summand
        out = _Attention.apply(query, key, value)
        # Scores and the weighted sum; a masked kernel computes the whole square.
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        self._tally.flops += 2 * pairs * (query.shape[3] + value.shape[3])
        return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(rows, heads, length, dtype=torch.float32))
        return out
