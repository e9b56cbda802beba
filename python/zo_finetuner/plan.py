"""`zo plan`: peak memory and time of a step, predicted from a model's config alone, before anything is downloaded.

    peak         weights + scratch + activations + method + tables           see `Memory`
    step time    forwards + passes; a forward takes max(flops / rate, bytes of weights / bandwidth) for its products
                 and bytes / bandwidth for its other operators, a pass over the weights bytes / bandwidth (`devices`)

The model is built on the meta device, so shapes are exact; activations are traced through its own forward (`trace`).
Every row is taken to have `seq` tokens, which bounds shorter ones.  Not counted: launches (an eager forward of a small
model waits for them, a CUDA graph does not), evaluation, generation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.adapters import Adapter, add_adapter
from zo_finetuner.devices import GPUS, Device, find_device, present_gpu, probe_cpu
from zo_finetuner.encoding import Encoded, collate
from zo_finetuner.errors import InputError, nearest, require_positive
from zo_finetuner.loading import empty_model
from zo_finetuner.lowrank import LowRankProbing
from zo_finetuner.optim import Learned, Method, ZOFineTuner, check_method, make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN
from zo_finetuner.probing import MODES, require_goes
from zo_finetuner.rows import forward_accepts, output_head
from zo_finetuner.scratch import SHARE_SAMPLE
from zo_finetuner.tasks import get_task
from zo_finetuner.trace import trace_loss, trace_probes
from zo_finetuner.trace_steps import trace_steps
from zo_kernels import Blocks

OPTION_TOKENS = 16  # of an answer that is not one token, unless told
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


@dataclass(frozen=True)
class Plan:
    """What `make_plan` was asked, and its answer.  width: the hidden size.  largest: the tensor that needs most of the
    scratch."""

    model: str
    architecture: str
    parameters: int
    dtype: torch.dtype
    optimizer: str
    probing: str
    task: str
    batch: int
    seq: int
    width: int
    largest: str
    memory: Memory
    work: Work


def make_plan(
    source: str,
    *,
    task: str = "sst2",
    batch: int = 16,
    seq: int = 256,
    option_tokens: int | None = None,
    optimizer: str = "mezo",
    probing: str = "auto",
    dtype: str = "auto",
    settings: Mapping[str, Any] | None = None,
    graphs: bool = False,
    adapter: Adapter | None = None,
) -> Plan:
    """Predict one step of `source`, a folder with a config.json or a Hub id (of which the config alone is fetched).

    batch: rows; seq: tokens of each that are fed, rounded up as `collate` does.  option_tokens: of an answer; default 1
    in classification (one prompt pass scores all candidates), else 16.  graphs: whether steps are captured into CUDA
    graphs.  adapter: what is trained instead of the whole model, lora or dora.  Raises InputError."""
    check_method(optimizer, settings=settings)
    if probing not in MODES:
        raise InputError(f'unknown probing "{probing}"{nearest(probing, MODES)}; there are: {", ".join(MODES)}')
    rows = planned_rows(task, batch, seq, option_tokens)
    model = empty_model(source, dtype)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq > positions:
        raise InputError(f"seq {seq} exceeds the {positions} positions of {source}")
    name, computes = type(model).__name__, model.dtype
    if adapter is not None:
        if adapter.kind not in ("lora", "dora"):
            raise InputError(f"adapter {adapter.kind}: starts with what the model says of real tokens, which a config "
                             f"does not know; it needs next to nothing besides inference")
        model, name = add_adapter(model, adapter), f"{name} with {adapter.kind}"
    blocks = trainable_blocks(model)
    kind = blocks.tensors[0].dtype
    method = planned_method(optimizer, model, blocks, batch, settings)
    require_goes(probing, method)
    if method.low_rank:
        probing = LowRankProbing.mode
    elif probing == "auto":
        probing = "inplace" if kind == torch.float32 and not method.scratch_only else "scratch"
    parameters = sum(blocks.numels)
    try:
        memory, work, largest = _predict(model, blocks, rows, method, probing, graphs)
    except InputError:
        raise
    except Exception as error:  # code of a model that needs values where there are only shapes fails in its own way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(f"model {source}: {name} cannot be followed by its shapes alone ({reason})") from None
    return Plan(
        model=source,
        architecture=name,
        parameters=parameters,
        dtype=computes,
        optimizer=optimizer,
        probing=probing,
        task=get_task(task).name,
        batch=batch,
        seq=-(-seq // 8) * 8,
        width=config.hidden_size,
        largest=largest,
        memory=memory,
        work=work,
    )


def plan_devices(plan: Plan, name: str | None = None, memory: float | None = None) -> list[Device]:
    """The devices to judge a plan by: one of this memory (GiB), the named one ("cpu": this machine's, whose rates are
    timed), else the GPU that is here, else the whole table.  Raises InputError."""
    if memory is not None:
        if name is not None:
            raise InputError("give --device or --device-memory, not both")
        require_positive("device_memory", memory)
        return [Device("a device", memory, 0, 0, 0)]
    if name is None:
        here = present_gpu()
        return list(GPUS) if here is None else [here]
    if name.casefold() != "cpu":
        return [find_device(name)]
    return [probe_cpu(plan.dtype, plan.batch * plan.seq, plan.width)]


def planned_rows(task: str, batch: int, seq: int, option_tokens: int | None = None) -> list[Encoded]:
    """Rows of the task's kind whose inputs have `seq` tokens; of several, the last is two of half the length: rows of
    unequal length share one, and attention takes a mask then."""
    found = get_task(task)
    classify = found.kind == "classification"
    if option_tokens is None:
        option_tokens = 1 if classify else OPTION_TOKENS
    for name, value in (("batch", batch), ("seq", seq), ("option_tokens", option_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if option_tokens > seq:
        raise InputError(f"option_tokens {option_tokens} exceeds seq {seq}")
    choices = len(found.candidates({})) if classify else 1

    def row(length: int) -> Encoded:
        prompt = (0,) * max(1, length + 1 - option_tokens)
        sequences = tuple(prompt + (1 + choice,) * option_tokens for choice in range(choices))
        return Encoded(found.kind, sequences, (option_tokens,) * choices, (0,), prompt)

    return [row(seq)] if batch == 1 else [*[row(seq)] * (batch - 1), row(seq // 2), row(seq - seq // 2)]


def planned_method(
    name: str, model: nn.Module, blocks: Blocks, batch: int, settings: Mapping[str, Any] | None
) -> Method:
    """As it would be made for the model; scales that are learned or measured elsewhere are stood in for."""
    if name == "closed-form":
        name = "sigma-one"
    nets = PertNN.fresh(blocks.names) if name == ZOFineTuner.name else None
    return make_method(name, model, batch_size=batch, pertnn=nets, settings=settings)


def _predict(
    model: nn.Module, blocks: Blocks, rows: list[Encoded], method: Method, probing: str, graphs: bool
) -> tuple[Memory, Work, str]:
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
