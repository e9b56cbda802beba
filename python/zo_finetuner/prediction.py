"""Bytes and work of a step from shapes alone: what `zo plan` predicts, once it is known what is trained and how.

The model is on the meta device, so shapes are exact; activations are traced through its own forward (`trace`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.devices import Device
from zo_finetuner.encoding import Encoded, collate
from zo_finetuner.optim import Learned, Method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.rows import forward_accepts, output_head
from zo_finetuner.scratch import SHARE_SAMPLE
from zo_finetuner.trace import trace_loss, trace_probes
from zo_finetuner.trace_steps import trace_steps
from zo_kernels import Blocks

BLOCK_STATS = 3 * 4 + 8  # bytes of `zo_kernels.BlockStats` for a block


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors.

    weights      parameters (tied ones once) and buffers, and the batch
    scratch      perturbed copies of the weights of the module that needs most, and of those that enclose it; of an
                 embedding the batch's rows, of the head the candidates' rows or a slice (`slices`); paired: both signs;
                 low rank: the factors as products take them, a direction's coordinates, copies of norms and biases
    activations  largest sum of tensors alive in a forward before the head
    logits       the same from the head on; activations and logits are not alive together, the larger counts
    method       its state for every weight; nets, scales and statistics per block; the direction of a derivative
    tables       of the GPU kernels: 56 bytes a tensor, 16 a chunk of 65,536 elements
    first        besides weights, method and tables in the first step: the growing scratch, the check of its rounding;
                 or where a low-rank method merges its updates into the weights and begins a subspace
                 (what the rehearsal of paired probing copies, the logits among it, is not counted, nor the trial of
                 slices, whole logits of 16 tokens before the first step)
    gradients, moments, kept: of first-order Adam in mixed precision: gradients in the weights' dtype, two fp32 moments
                 and, for 16-bit weights, fp32 copies of them; what the forward keeps for the backward
    inference    weights and a forward on the same batch
    pool         what graphs of whole steps hold all the time: what a step of the largest bucket needs; the first step
                 of a bucket is eager and takes its own beside it.  0 without graphs
    learning     `zo learn` of scales on the same batch, in fp32: weights, a forward that keeps what its backward
                 needs, 9/8 of the largest gradient and a tied embedding's (`learning/streaming.py`): a bound.  Not
                 counted: the momentum of recipe "paper".  Recipe "forward" takes no more than an fp32 step in place
    """

    weights: int
    scratch: int
    activations: int
    logits: int
    method: int
    tables: int
    first: int
    gradients: int
    moments: int
    kept: int
    inference: int
    pool: int
    learning: int

    @property
    def peak(self) -> int:
        later = self.scratch + max(self.activations, self.logits)
        return self.weights + self.method + self.tables + max(later + self.pool, self.first)

    @property
    def ratio(self) -> float:
        return self.peak / self.inference

    @property
    def adam(self) -> int:
        return self.weights + self.gradients + self.moments + self.kept


@dataclass(frozen=True)
class Work:
    """Of one step.  flops of all forwards, bytes of weights that they read (in place: taken as all), bytes that their
    operators besides products read and write; bytes that passes over the weights move; operators of one forward."""

    forwards: int
    flops: int
    read: int
    traffic: int
    moved: int
    operators: int

    def seconds(self, device: Device, dtype: torch.dtype) -> tuple[float, float]:
        """(all forwards, all passes).  A product timed at the batch's own shape has its weights' reads in it."""
        reading = 0 if device.measured else self.read / device.bytes
        products = max(self.flops / device.flops(dtype), reading)
        return products + self.traffic / device.traffic, self.moved / device.bytes


def predict(
    model: nn.Module, blocks: Blocks, rows: list[Encoded], method: Method, probing: str, graphs: bool
) -> tuple[Memory, Work, str]:
    """model: on the meta device, and changed by this.  blocks, method: of it.  The last: the tensor that needs most of
    the scratch."""
    numel, size = sum(blocks.numels), blocks.tensors[0].element_size()
    learned = isinstance(method.scales, Learned)
    packed = "position_ids" in forward_accepts(model)  # others cannot tell rows apart
    data = collate(rows, pad_id=0, packed=packed, few_shapes=graphs)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *data.values()))
    named = len([*model.named_parameters(remove_duplicate=False)])
    tied = max(blocks.numels) if named > len([*model.parameters()]) else 0  # of what is tied the largest, an embedding
    batch = {name: tensor.to("meta") for name, tensor in data.items()}
    own = method_bytes(method, blocks)
    whole = copy.deepcopy(model) if method.low_rank else None
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    if "candidates" in data:
        _keep_head_rows(model, len(data["candidates"]))
    once = trace_loss(model, batch)
    trained = numel * size
    count = method.forwards
    cost, first, scratch, largest = once, 0, 0, ""
    work = Work(count, count * once.flops, count * trained, count * once.traffic, 2 * (count + 1) * trained,
                once.operators)  # fmt: skip
    if method.slopes:  # every tensor of a forward twice
        cost = replace(once, body=2 * once.body, logits=2 * once.logits)
    elif method.low_rank:  # its head is taken whole: a few rows more of logits
        steps = trace_steps(whole, trainable_blocks(whole), batch, method)
        cost, largest = steps.later, "factors and copies of vectors"
        first = max(steps.first, steps.turning) - method.factor_bytes
        scratch = max(0, steps.kept - method.factor_bytes)
        merged = 2 * trained * method.merges_per_step
        work = Work(steps.forwards, cost.flops, steps.forwards * trained, cost.traffic, round(merged),
                    cost.operators // steps.forwards)  # fmt: skip
    elif probing != "inplace":
        probed = trace_probes(model, trainable_blocks(model), batch, probing)
        cost, first, scratch, largest = probed.later, probed.first, probed.scratch, probed.largest
        if size == 2:  # the check of what rounding leaves of a perturbation: four fp64 copies of a sample, and one
            first = max(first, (4 * 8 + size) * min(SHARE_SAMPLE, max(blocks.numels)))
        # One read of the weights makes a copy, or two for both signs; forwards read what was written.
        pairs = method.pairs if probing == "paired" else 0
        alone = count - 2 * pairs
        work = Work(
            forwards=pairs + alone,
            flops=pairs * cost.flops + alone * once.flops,
            read=count * probed.written,
            traffic=pairs * cost.traffic + alone * once.traffic,
            moved=(3 * pairs + 2 * alone) * probed.written + 2 * trained,
            operators=cost.operators,
        )
    work = replace(work, read=work.read + (work.forwards if method.low_rank else count) * frozen)
    state = sum(t.nbytes for states in _states(method) for t in states)
    work = replace(work, moved=work.moved + 2 * state)
    if learned:
        work = replace(work, moved=work.moved + trained)  # statistics of all weights
    kept = trace_loss(model, batch, gradients=True).kept
    backward = trace_loss(model.float(), batch, gradients=True).peak
    memory = Memory(
        weights=held,
        scratch=scratch,
        activations=cost.body,
        logits=cost.logits,
        method=own,
        tables=len(blocks) * 56 + sum(-(-n >> 16) * 16 for n in blocks.numels),
        first=first,
        gradients=trained,
        moments=numel * (8 if size == 4 else 12),
        kept=kept,
        inference=held + once.peak,
        pool=max(cost.body, cost.logits) if graphs else 0,
        learning=held + numel * (4 - size) + backward + 4 * (9 * max(blocks.numels) // 8 + tied),
    )
    return memory, work, largest


def method_bytes(method: Method, blocks: Blocks) -> int:
    """What a method that has not yet made a step keeps for these blocks: states, factors, nets, scales, numbers per
    block, and the direction of a derivative.  The weights are not its own."""
    kept = {t.untyped_storage()._cdata: t.nbytes for t in _tensors(method)}
    for weight in blocks.tensors:
        kept.pop(weight.untyped_storage()._cdata, None)
    along = sum(weight.nbytes for weight in blocks.tensors) if method.slopes else 0
    per_block = BLOCK_STATS * isinstance(method.scales, Learned) + 4
    return sum(kept.values()) + method.factor_bytes + along + len(blocks) * per_block


def _states(method: Method) -> list[list[Tensor]]:
    """What the update's pass reads and writes besides the weights."""
    return [tensors for tensors in method.state_dict().values() if isinstance(tensors, list)]


def _keep_head_rows(model: nn.Module, count: int) -> None:
    """Leave as many rows of the head as there are candidates: what `rows.head_rows` does to a model with storage."""
    head = output_head(model)
    for name, parameter in head._parameters.items():
        if parameter is not None:
            setattr(head, name, nn.Parameter(parameter.detach()[:count].clone()))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a method keeps."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))
