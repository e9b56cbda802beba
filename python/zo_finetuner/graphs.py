"""Whole steps as CUDA graphs: asked, evaluated, told and applied by one launch, for every bucket of inputs.

    bucket    inputs of one structure, of the same shapes and dtypes, for one function of the loss
    1st time  an eager step, watched for what a graph cannot hold (`capturable.py`); kernels compile, scratch grows
    2nd time  the step is captured on copies of the inputs, which executes nothing, and then replayed
    after     inputs are copied into those copies, and the graph is replayed

What changes from step to step lies in device memory at fixed addresses: learning rate and seeds (`step_inputs.py`),
eps, what the method remembers, the rounding thresholds.  The engine writes those from outside, before a replay, and
counts the step after it.  Python does not run in a replay: neither the model's hooks, nor the loss function, nor the
method.

Nothing is deferred: a replay ends with the update, so the weights are whole between steps, for any reader of them.

Memory: graphs are captured one after the other on one stream into one pool.  They share what each needs while it runs,
so the pool takes what the largest bucket does; an eager step takes its memory beside it, outside.  torch sets cuBLAS a
workspace of a fixed size for each stream: a graph has the one of the capture's, as large as an eager step's, so that
cuBLAS makes the same choices and the same bits.

A replay is only right while what was captured stands.  What may have changed is compared at every step; where it did,
all graphs are made anew, and a line of the log says why.  torch's own switches (TF32, deterministic algorithms) and
hooks put on the model later are not looked at.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from zo_finetuner.capturable import CaptureCheck
from zo_finetuner.engine import Engine, LossOf
from zo_finetuner.errors import InputError
from zo_kernels import backend_name

logger = logging.getLogger(__name__)

MOST = 64  # graphs; 200 batches of DROP have 55 shapes
IDLE = 4 * MOST  # steps without a replay after which a graph makes room for another
KNOWN = 16 * MOST  # buckets that are remembered as met


class Graph(Protocol):
    def replay(self) -> None: ...


class Capturer(Protocol):
    """bytes: what all captures have reserved."""

    bytes: int

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """A graph of what `run` puts on the device, and the tensor it returns, which a replay fills."""


class CudaCapturer:
    """CUDA's own.  InputError for a device that has none."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise InputError(f"CUDA graphs need a model on a CUDA device, this one is on {device}: leave graphs off")
        self.device, self.bytes = device, 0
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            with torch.cuda.stream(self._stream):  # the stream's cuBLAS workspace: outside the pool, for all captures
                square = torch.zeros(16, 16, device=device)
                torch.mm(square, square)
            torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the stream back where a failed capture's own end does not.  "thread_local": a thread
        # that pins the next batch meanwhile is no fault.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = run()
            self.bytes += torch.cuda.memory_reserved() - before
        return graph, loss


@dataclass
class Captured:
    """A step of one bucket.  inputs: the leaves that it reads; loss: (0-dim) that it writes; metrics: the method's."""

    graph: Graph
    inputs: list[Any]
    loss: Tensor
    metrics: dict[str, Tensor]
    used: int


class GraphedSteps:
    """Steps of an engine as graphs.

    capturer: default CUDA's.  most: graphs kept at a time; where more buckets than that keep coming back, the others
    take eager steps.  reason: why all steps are eager; empty while none is.  captures, replays: how many there were."""

    def __init__(self, engine: Engine, capturer: Capturer | None = None, most: int = MOST):
        self.engine, self.most = engine, most
        self.capturer = CudaCapturer(engine.device) if capturer is None else capturer
        self.reason = "" if engine.method.uniform else f"the steps of {engine.method.name} are not all alike"
        if engine.ranks is not None:
            self.reason = "losses travel between processes in every step"
        if self.reason:
            logger.info("no CUDA graphs, all steps are eager: %s", self.reason)
        self.captures = self.replays = 0
        self._met: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()  # the least recently used first
        self._premises: list[tuple[str, Any]] = []
        self._frozen: list[_Frozen] = []
        self._full = False

    def step(self, loss_of: LossOf, inputs: Any, lr: float | Tensor) -> Tensor:
        """`Engine.step_on`, with the same bits.  loss_of: the same object in every step (a method of an object is); it
        may read nothing from the host that changes.  inputs: any nest of tuples, lists and dicts of tensors; other
        leaves belong to the bucket and have to be hashable."""
        engine = self.engine
        engine.begin(lr)
        loss = self._compute(loss_of, inputs)
        engine.end()
        return loss

    @torch.no_grad()
    def _compute(self, loss_of: LossOf, inputs: Any) -> Tensor:
        self._require_premises()
        if self.reason or not self.engine.probing.settled:
            return self.engine.compute(lambda: loss_of(inputs))
        leaves, spec = tree_flatten(inputs)
        bucket = (loss_of, spec, *map(_form, leaves))
        if bucket not in self._met:
            return self._watched(bucket, loss_of, inputs)
        if bucket not in self._graphs and self._has_room():
            self._capture(bucket, loss_of, leaves, spec)
        captured = self._graphs.get(bucket)
        if captured is None:
            return self.engine.compute(lambda: loss_of(inputs))
        return self._replay(bucket, captured, leaves)

    def _watched(self, bucket: Hashable, loss_of: LossOf, inputs: Any) -> Tensor:
        """The bucket's first step."""
        with CaptureCheck() as check:
            loss = self.engine.compute(lambda: loss_of(inputs))
        if check.found:
            self._give_up(f"a graph cannot hold {check.found}")
        elif self.engine.probing.settled:  # else a kind of model call is still to be trusted
            if len(self._met) >= KNOWN:
                self._met = set(self._graphs)
            self._met.add(bucket)
        return loss

    def _has_room(self) -> bool:
        if len(self._graphs) < self.most:
            return True
        oldest = next(iter(self._graphs))
        if self.engine.step_count - self._graphs[oldest].used > IDLE:
            del self._graphs[oldest]
            return True
        if not self._full:
            logger.info("more than %d buckets of inputs keep coming back: the others take eager steps", self.most)
        self._full = True
        return False

    def _capture(self, bucket: Hashable, loss_of: LossOf, leaves: list[Any], spec: TreeSpec) -> None:
        engine = self.engine
        if not self._graphs:
            self._frozen, self._premises = _frozen(engine), _premises(engine)
        copies = [leaf.to(engine.device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = tree_unflatten(copies, spec)
        faults: list[Exception] = []

        def run() -> Tensor:
            try:
                return engine.compute(lambda: loss_of(inputs), captured=True)
            except Exception as error:
                faults.append(error)
                raise

        try:
            graph, loss = self.capturer.capture(run)
        except Exception as error:
            first = (faults or [error])[0]  # a capture that failed fails again as it ends, in other words
            self._give_up(f"the capture failed: {type(first).__name__}: {first}".splitlines()[0])
            return
        self._graphs[bucket] = Captured(graph, copies, loss, engine.method.metrics, engine.step_count)
        if not self.captures:
            logger.info("steps are replayed as CUDA graphs from here on, one for each shape of the inputs")
        self.captures += 1
        logger.debug("graph %d: all have %d bytes", self.captures, self.capturer.bytes)

    def _replay(self, bucket: Hashable, captured: Captured, leaves: list[Any]) -> Tensor:
        pairs = [(copy, leaf) for copy, leaf in zip(captured.inputs, leaves, strict=True) if isinstance(leaf, Tensor)]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)), non_blocking=True)
        captured.graph.replay()
        captured.used = self.engine.step_count
        self._graphs.move_to_end(bucket)
        self.engine.method.metrics = captured.metrics
        self.replays += 1
        return captured.loss.clone()

    def _require_premises(self) -> None:
        """Forget all graphs if what they take for granted has changed."""
        if not self._graphs:
            return
        now = _premises(self.engine)
        changed = [name for (name, old), (_, new) in zip(self._premises, now, strict=False) if not _same(old, new)]
        changed += [frozen.name for frozen in self._frozen if frozen.has_moved()]
        if len(now) != len(self._premises):
            changed.append("the method")
        if changed:
            logger.info("CUDA graphs are captured anew: %s changed", " and ".join(changed[:3]))
            self._graphs.clear()
            self._met.clear()

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._graphs.clear()
        logger.warning("no CUDA graphs, all steps are eager: %s", reason)


def _form(leaf: Any) -> Hashable:
    """What a graph takes for granted of a leaf of the inputs."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _premises(engine: Engine) -> list[tuple[str, Any]]:
    """(name, value) of what a captured step has taken from the host."""
    kind, method = engine.device.type, engine.method
    autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    named = {
        "the method": method,
        "weight_decay": engine.weight_decay,
        "the limits": engine.guard.limits,
        "eps (write it in place)": engine.eps,
        "the scratch": engine.probing.grown,
        "the way pairs are evaluated": getattr(engine.probing, "reason", ""),
        "autocast": autocast,
        "the backend": backend_name(kind),
    }
    own = {name: value for name, value in vars(method).items() if name[0] != "_" and name != "metrics"}
    return [*named.items(), *((f"the method's {name}", value) for name, value in own.items())]


def _same(old: Any, new: Any) -> bool:
    plain = isinstance(old, bool | int | float | str | tuple)
    return type(old) is type(new) and old == new if plain else old is new


@dataclass
class _Frozen:
    """A parameter or buffer that the engine does not train, where it was at the capture."""

    name: str
    place: dict[str, Any]
    key: str
    tensor: Tensor
    memory: Tensor

    def has_moved(self) -> bool:
        return self.place.get(self.key) is not self.tensor or not self.memory.is_set_to(self.tensor)


def _frozen(engine: Engine) -> list[_Frozen]:
    trained = {id(parameter) for parameter in engine.parameters}
    return [
        _Frozen(f"{path}.{key}".lstrip("."), place, key, tensor, tensor.detach())
        for path, module in engine.model.named_modules()
        for place in (module._parameters, module._buffers)
        for key, tensor in place.items()
        if tensor is not None and id(tensor) not in trained
    ]
