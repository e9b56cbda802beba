"""Forwards that compute less of the output head: only some vocabulary rows, or only some positions.

Both work with hooks on the head, so the model's own forward still does all the rest: soft caps (Gemma 2),
logit scales (Cohere, Granite) and adapters keep their effect.

A batch may be doubled inside the model call, its rows repeated along dimension 0 (`paired.py`): the head is then given
(2N, T, hidden) where the caller's batch has N rows.  All that is made here keeps rows in dimension 0, the repeats one
behind the other, so that halves split before the head, after it and in what the model returns.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.quantised import form


@contextlib.contextmanager
def head_rows(model: nn.Module, token_ids: Tensor) -> Iterator[bool]:
    """Within the context the output head computes only the columns of token_ids ((V,), int64), in their
    order.

    Yields whether it does. It is False, and the logits are full, where rows cannot be taken by swapping
    storage: with gradients enabled (autograd would keep the swapped rows), while weights are dual numbers
    (`tangent.py`), for a head that is not a plain nn.Linear (LoRA, quantised, parametrised) and for one whose weights
    are moved in and out by accelerate.
    See `objective.candidate_logits` for columns in every case.

    The ids stand in `head._zo_rows` meanwhile: a scratch prober then perturbs only those rows and swaps them
    in itself, and the head is left as it is found. All storages are back when the context ends, whatever
    happened.
    """
    head = output_head(model)
    dual = not isinstance(getattr(head, "weight", None), nn.Parameter)  # `tangent.py`
    if torch.is_grad_enabled() or dual or why_whole(head) or head.weight.is_meta:
        yield False
        return
    ids = token_ids.to(head.weight.device)
    with only_rows(head, ids, lambda data: data.index_select(0, ids)):
        yield True


def why_whole(head: nn.Module | None) -> str:
    """Why a head cannot be given some of its rows by swapping storage; empty where it can."""
    if head is None:
        return "it does not tell its head"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    if form(head.weight):
        return f"its head is quantised ({form(head.weight)})"
    return "accelerate moves the weights of its head" if hasattr(head, "_hf_hook") else ""


@contextlib.contextmanager
def only_rows(head: nn.Linear, ids: Tensor, take: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context a head for which `why_whole` is empty has the rows ids only, int64 on its device and fewer
    than all.  take: them, of a parameter's data (a copy or a view)."""
    own: list[tuple[nn.Parameter, Tensor]] = []

    def swap_in(module: nn.Module, args: tuple) -> None:
        for parameter in module._parameters.values():
            # A prober has put its perturbed rows in where there are as many as asked for.
            if parameter is not None and parameter.shape[0] != ids.numel():
                own.append((parameter, parameter.data))
                parameter.data = take(parameter.data)

    def swap_out(*_: Any) -> None:
        while own:
            parameter, data = own.pop()
            parameter.data = data

    head._zo_rows = ids
    # Prepended: a prober's hooks enclose these (it swaps first and undoes last), so swaps nest.
    hooks = [
        head.register_forward_pre_hook(swap_in),
        head.register_forward_hook(swap_out, always_call=True, prepend=True),
    ]
    try:
        yield
    finally:
        swap_out()  # torch runs always_call hooks after an Exception, but not after Ctrl-C
        for hook in hooks:
            hook.remove()
        del head._zo_rows


@contextlib.contextmanager
def label_places(model: nn.Module, places: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the context the output head sees only the hidden states at `places`, (N, K) int64 places in the N rows:
    (R * N, T, hidden) becomes (R * N, K, hidden) for a batch of R repeats.

    Yields a function to call on the logits: it takes the places of a model that does not tell its head, or makes its
    logits elsewhere, and leaves (N, K, vocabulary) as it is, also where the model's answer was kept from an earlier
    call and the head is not run."""
    head = output_head(model)

    def take(states: Tensor) -> Tensor:
        index = places.to(states.device).repeat(states.shape[0] // places.shape[0], 1)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    hook = None if head is None else head.register_forward_pre_hook(lambda module, args: (take(args[0]), *args[1:]))
    try:
        yield lambda logits: take(logits) if head is None or logits.shape[1] != places.shape[1] else logits
    finally:
        if hook is not None:
            hook.remove()


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, found through wrappers; None where the model does not tell."""
    return unwrap(model).get_output_embeddings()


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside torch.compile, DistributedDataParallel and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def forward_accepts(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the unwrapped model's forward takes."""
    return _parameters(type(unwrap(model)))


_KNOWN: dict[type, frozenset[str]] = {}


def _parameters(cls: type) -> frozenset[str]:
    # Remembered, since inspect takes 0.1 ms, twice in every step.
    if cls not in _KNOWN:
        _KNOWN[cls] = frozenset(inspect.signature(cls.forward).parameters)
    return _KNOWN[cls]
