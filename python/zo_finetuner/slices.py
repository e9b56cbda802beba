"""Token losses of a head larger than any other matrix, from a slice of its rows at a time.

    loss = log(sum_v exp(logit_v - top)) - (logit_target - top)        top: the largest logit so far, all in fp32

Neither a perturbed copy of the head, (vocabulary, hidden), nor logits over the vocabulary are ever made: a scratch
prober perturbs the slice's rows (with the noise of their places) and the sum goes on from slice to slice.

The model's own forward makes every slice's logits.  Its body runs once; the forward is then run again for each further
slice and given the body's answer as it was.  So what it does behind the head, soft caps (Gemma 2) and scales (Cohere,
Granite), is done to each slice.  That this gives the losses of the whole head is tried on the model itself, once.

Equal to the whole head's losses to the rounding of the sum and of products, whose order may depend on the number of
rows; to the bit between probings that evaluate the same weights.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_finetuner.autocast import casts_not_kept
from zo_finetuner.masks import positions_as_given
from zo_finetuner.routes import Forward, rerouted, rerouted_inside
from zo_finetuner.rows import forward_accepts, label_places, only_rows, output_head, unwrap, why_whole
from zo_finetuner.virtual_tokens import virtual_tokens

logger = logging.getLogger(__name__)

LEAST = 1 << 22  # elements (8 MB in bf16): a slice costs a pass through the Python of the model's forward, 0.2 ms


@dataclass
class Slicing:
    """How a head is read.  shape: its weight's.  rows: at a time, 0: all.  body: the modules that the model's forward
    calls before the head.  fault: why all rows are read though they are many.  told: the log has said so."""

    head: nn.Module | None
    shape: torch.Size | None = None
    rows: int = 0
    body: tuple[nn.Module, ...] = ()
    fault: str = ""
    told: bool = False


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Slicing] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def head_slices(model: nn.Module, targets: Tensor) -> Iterator[bool]:
    """Within the context the model's `logits` are losses: negative log-probabilities (R * N, K, 1), fp32, of targets
    (N, K), int64, where its head is given R repeats of N rows of K states.

    Yields whether they are.  They are logits as ever with gradients enabled (a backward needs them), for a head that
    one slice covers (`slice_rows`), and where slices cannot be made or were found to give other losses: a line of the
    log says which model and why.  The targets stand in `head._zo_targets` meanwhile."""
    plan = slicing(model)
    dual = plan.rows and not isinstance(plan.head.weight, nn.Parameter)  # `tangent.py`
    if torch.is_grad_enabled() or not plan.rows or dual:
        if plan.fault and not plan.told:
            name, (rows, width) = type(unwrap(model)).__name__, plan.shape
            logger.warning("%s: its head (%d x %d) is read whole, not in slices: %s", name, rows, width, plan.fault)
            plan.told = True
        yield False
        return
    with _in_slices(unwrap(model), plan, targets):
        yield True


def slicing(model: nn.Module) -> Slicing:
    """How the head of `model` is read for losses over the whole vocabulary.

    Asked once per model; where the head has more than a slice, that takes two forwards of 16 tokens and waits for the
    device, so `make_probing` asks before a step does."""
    bare = unwrap(model)
    head = output_head(model) if hasattr(bare, "get_output_embeddings") else None
    shape = getattr(getattr(head, "weight", None), "shape", None)
    known = _KNOWN.get(bare)
    if known is None or known.head is not head or known.shape != shape:
        _KNOWN[bare] = known = _made(model, head, shape)
    return known


def slice_rows(model: nn.Module, head: nn.Module) -> int:
    """Rows of the head in a slice, 0 for all: as many as give it at most the elements of the model's largest tensor
    other than embeddings and the head, or LEAST if that is more; then so few that the slices, multiples of 64 rows, are
    of one size."""
    vocabulary, width = head.weight.shape
    aside = {id(p) for m in model.modules() if m is head or isinstance(m, nn.Embedding) for p in m.parameters()}
    largest = max((p.numel() for p in model.parameters() if id(p) not in aside), default=0)
    most = max(1, max(largest, LEAST) // width)
    even = -(-vocabulary // -(-vocabulary // most))
    return 0 if most >= vocabulary else min(most, -(-even // 64) * 64)


def _made(model: nn.Module, head: nn.Module | None, shape: torch.Size | None) -> Slicing:
    rows = slice_rows(unwrap(model), head) if shape is not None and len(shape) == 2 else 0
    if not rows:
        return Slicing(head, shape)
    fault = why_whole(head) or ("it is compiled" if hasattr(model, "_orig_mod") else "")
    if fault:
        return Slicing(head, shape, fault=fault)
    training = model.training
    model.eval()
    try:
        return _tried(model, head, shape, rows)
    except Exception as error:  # a model that is no causal language model fails in its own way
        return Slicing(head, shape, fault=f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        model.train(training)


@torch.no_grad()
def _tried(model: nn.Module, head: nn.Linear, shape: torch.Size, rows: int) -> Slicing:
    """16 tokens, with targets from the first row of the head to the last, whole and in slices.

    The mean difference is to be at most 4 ulp of the largest logit or loss: differently ordered sums make 1 at most,
    a step behind the head that treats columns together (a log-softmax, say) .7 and more."""
    count = min(16, shape[0])
    device = head.weight.device
    inputs = {"input_ids": torch.arange(count, device=device)[None], "attention_mask": None}
    if "use_cache" in forward_accepts(model):
        inputs["use_cache"] = False
    targets = torch.tensor([[i * (shape[0] - 1) // max(count - 1, 1) for i in range(count)]], device=device)
    places = torch.arange(count, device=device)[None] + virtual_tokens(model).ahead
    bare = unwrap(model)
    with positions_as_given(), label_places(model, places) as at_places:
        with _direct_calls(bare) as calls:
            logits = at_places(model(**inputs).logits)
        if calls.count(head) != 1 or len(set(calls)) != len(calls):
            return Slicing(head, shape, fault="its forward does not call its head, and what is before it, once each")
        plan = Slicing(head, shape, rows, tuple(calls[: calls.index(head)]))
        with _in_slices(bare, plan, targets):
            losses = model(**inputs).logits
    if losses.shape != (1, count, 1):
        return Slicing(head, shape, fault="its wrapper does not call its forward")
    whole = F.cross_entropy(logits[0].float(), targets[0], reduction="none")
    if logits.is_meta:
        return plan
    off = float((losses[0, :, 0] - whole).abs().mean())
    size = max(1.0, *(float(x.nan_to_num(0, 0, 0).abs().max()) for x in (logits, whole)))  # masked columns are infinite
    if off <= 4 * torch.finfo(logits.dtype).eps * size:
        return plan
    return Slicing(head, shape, fault=f"slices give losses that differ by {off:.3g} from those of the whole head")


@contextlib.contextmanager
def _direct_calls(bare: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that the model's own forward calls within the context, in order, without those that they call."""
    calls: list[nn.Module] = []
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple) -> None:
        if not running:
            calls.append(module)
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for module in bare.modules():
        if module is not bare:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _in_slices(bare: nn.Module, plan: Slicing, targets: Tensor) -> Iterator[None]:
    head = plan.head

    def each_slice(_: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        losses, answers = _Losses(targets), {}

        def once(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            if module not in answers:
                answers[module] = forward(*args, **kwargs)
            return answers[module]

        with rerouted(plan.body, once), casts_not_kept():
            for start in range(0, plan.shape[0], plan.rows):
                output = None  # the logits before are given back first
                end = min(start + plan.rows, plan.shape[0])
                ids = torch.arange(start, end, device=head.weight.device)
                with only_rows(head, ids, lambda data, start=start, end=end: data[start:end]):
                    output = forward(*args, **kwargs)
                losses.add(output.logits, start)
        output.logits = losses.value()
        return output

    head._zo_targets = targets
    try:
        with rerouted_inside(bare, each_slice):
            yield
    finally:
        del head._zo_targets


class _Losses:
    """The sum over slices.  top: (R * N, K) largest logit so far; total: sum of exp(logit - top)."""

    def __init__(self, targets: Tensor):
        self._targets = targets
        self._top = self._total = self._target = None

    def add(self, logits: Tensor, start: int) -> None:
        """logits: (R * N, K, rows) of the rows from `start` on."""
        given, logits = logits, logits.float()
        if self._top is None:
            targets = self._targets.to(logits.device)
            self._targets = targets.repeat(logits.shape[0] // targets.shape[0], 1)
            self._target = logits.new_zeros(self._targets.shape)
            self._total = torch.zeros_like(self._target)
            self._top = torch.full_like(self._target, torch.finfo(torch.float32).min)  # finite: -inf - -inf is NaN
        place = (self._targets - start)[..., None]
        here = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1))
        inside = (place >= 0) & (place < logits.shape[-1])
        self._target = torch.where(inside, here, self._target[..., None])[..., 0]
        top = torch.maximum(self._top, logits.amax(-1))
        shifted = torch.sub(logits, top[..., None], out=None if logits is given else logits)
        self._total = self._total * (self._top - top).exp() + shifted.exp_().sum(-1)
        self._top = top

    def value(self) -> Tensor:
        """(R * N, K, 1)"""
        return (self._total.log() - (self._target - self._top))[..., None]
