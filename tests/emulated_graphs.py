"""CUDA graphs on the CPU: what a capture and a replay do to memory, operator by operator, without a GPU.

A capture runs the operators and notes each with its arguments and results; what it wrote outside its pool is put back,
and the pool is left as garbage: as if nothing had been executed.  A replay executes the notes again, into the very
tensors of the capture; no Python of the step runs.  Then whatever of the pool Python did not hold when the capture
ended is garbage again, for the graphs share one pool.  Operators that a CUDA capture refuses raise while capturing.

Kernels that are no operators (the C++ backend's) cannot be noted: use the reference backend.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zo_kernels as zk
from zo_finetuner import calls
from zo_finetuner.capturable import obstacle


def quick_words(seed, counters):
    """Instead of Philox, whose 200 operators a block would be most of what is noted and replayed."""
    c0, c1, c2, c3 = counters
    mixed = (c0 * 2654435761 + c2 * 40503 + c3 * 977 + c1 + seed % 1000003) % 4294967291
    return torch.stack([(mixed * odd + 12345) & 0xFFFFFFFF for odd in (1, 69069, 1103515245, 134775813)], dim=-1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Torch's operators only, and no tensor is looked at because it lies in the host's memory."""
    monkeypatch.setattr(calls, "COMPARED_AT_ONCE", ())
    monkeypatch.setattr(zk.noise, "philox", quick_words)
    with zk.use_backend("reference"):
        yield


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors(values) -> list[Tensor]:
    """Of an operator's arguments or results; a step has 10,000 operators, and pytrees take their time."""
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in tensors(value)] if isinstance(values, list | tuple) else []


def aliased(values):
    """The same with tensors of their own: a parameter's storage is swapped behind its back."""
    if isinstance(values, Tensor):
        return values.detach()
    return type(values)(map(aliased, values)) if isinstance(values, list | tuple) else values


def written(func, args, kwargs) -> list[Tensor]:
    named = [*zip(func._schema.arguments, args, strict=False)]
    named += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    return [t for a, value in named if a.alias_info is not None and a.alias_info.is_write for t in tensors(value)]


def spoil(tensor: Tensor) -> None:
    tensor.fill_(torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else -12345)


class EmulatedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.notes = []  # (func, args, kwargs, results)
        self.pool: dict[int, Tensor] = {}  # place -> a tensor of it, made while capturing
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # place -> (tensor outside, what was in all of it)
        self.free: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = obstacle(func, args, kwargs)
        if reason:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} ({reason})")
        writes = [] if torch.Tag.inplace_view in func.tags else written(func, args, kwargs)
        for tensor in writes:
            if place(tensor) not in self.pool and place(tensor) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[place(tensor)] = whole, whole.clone()
        kept = aliased(args), {name: aliased(value) for name, value in kwargs.items()}
        results = func(*args, **kwargs)
        ours = {place(t) for t in (*tensors(args), *tensors([*kwargs.values()])) if t.numel()}
        made = [t.detach() for t in tensors(results)]
        if writes or any(place(t) not in ours for t in made if t.numel()):
            self.notes.append((func, *kept, None if writes else made))
            for t in () if writes else made:
                self.pool[place(t)] = t
        return results

    def finish(self) -> None:
        for whole, bytes_before in self.before.values():
            whole.copy_(bytes_before)
        self.before.clear()
        own = {id(t) for _, args, kwargs, made in self.notes for t in tensors([*args, *kwargs.values(), made])}
        held = {place(o) for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter) and id(o) not in own}
        self.free = [t for at, t in self.pool.items() if at not in held]
        for tensor in self.pool.values():
            spoil(tensor)

    @torch.no_grad()
    def replay(self) -> None:
        EmulatedCapturer.replayed += 1
        for func, args, kwargs, made in self.notes:
            results = func(*args, **kwargs)
            for target, result in zip(made or (), tensors(results), strict=made is not None):
                target.copy_(result)
        for tensor in self.free:
            spoil(tensor)


class EmulatedCapturer:
    """For `graphs.GraphedSteps`.  replayed: how often any graph was."""

    bytes = replayed = 0

    def capture(self, run: Callable[[], Tensor]) -> tuple[EmulatedGraph, Tensor]:
        graph, asked = EmulatedGraph(), torch.cuda.is_current_stream_capturing
        torch.cuda.is_current_stream_capturing = lambda: True
        try:
            with graph:
                result = run()
        except BaseException:
            graph.finish()
            raise
        finally:
            torch.cuda.is_current_stream_capturing = asked
        graph.finish()
        return graph, result
