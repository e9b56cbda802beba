"""`zo plan`: peak memory and time of a step, predicted from a model's config alone, before anything is downloaded.

    peak         weights + scratch + activations + method + tables           see `Memory`
    step time    forwards + passes; a forward takes max(flops / rate, bytes of weights / bandwidth) for its products
                 and bytes / bandwidth for its other operators, a pass over the weights bytes / bandwidth (`devices`)

Every row is taken to have `seq` tokens, which bounds shorter ones.  Not counted: launches (an eager forward of a small
model waits for them, a CUDA graph does not), evaluation, generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo_finetuner.adapters import Adapter, add_adapter
from zo_finetuner.devices import GPUS, Device, find_device, present_gpu, probe_cpu
from zo_finetuner.encoding import Encoded
from zo_finetuner.errors import InputError, nearest, require_positive
from zo_finetuner.loading import empty_model
from zo_finetuner.lowrank import LowRankProbing
from zo_finetuner.optim import Method, ZOFineTuner, check_method, make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN
from zo_finetuner.prediction import Memory, Work, predict
from zo_finetuner.probing import MODES, require_goes
from zo_finetuner.quantised_shapes import quantise_shapes
from zo_finetuner.tasks import get_task
from zo_kernels import Blocks

OPTION_TOKENS = 16  # of an answer that is not one token, unless told


@dataclass(frozen=True)
class Plan:
    """What `make_plan` was asked, and its answer.  parameters: that are trained.  width: the hidden size.  quantize:
    how the base is quantised, empty where it is not.  largest: the tensor that needs most of the scratch."""

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
    quantize: str
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
    quantize: str | None = None,
) -> Plan:
    """Predict one step of `source`, a folder with a config.json or a Hub id (of which the config alone is fetched).

    batch: rows; seq: tokens of each that are fed, rounded up as `collate` does.  option_tokens: of an answer; default 1
    in classification (one prompt pass scores all candidates), else 16.  graphs: whether steps are captured into CUDA
    graphs.  adapter: what is trained instead of the whole model, lora or dora.  quantize: how its base is quantised,
    one of `quantised.QUANTISATIONS`; with lora.  Raises InputError."""
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
    if quantize:
        if adapter is None or adapter.kind != "lora":
            raise InputError("a quantised base is planned under lora: give --adapter lora, or leave --quantize")
        model, name = quantise_shapes(model, quantize), f"{name} in {quantize}"
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
        memory, work, largest = predict(model, blocks, rows, method, probing, graphs)
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
        quantize=quantize or "",
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
