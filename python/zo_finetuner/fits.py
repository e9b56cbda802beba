"""Whether the weights and what a method keeps beside them fit the device, told before anything is loaded.

Both are exact, from shapes alone, and less than any step needs (`plan.Memory.peak`): what is refused here would have
failed after the download, at the first step or in its allocation.
"""

from __future__ import annotations

import os

from zo_finetuner.config import RunConfig
from zo_finetuner.devices import Device, present_gpu
from zo_finetuner.errors import InputError
from zo_finetuner.loading import empty_model
from zo_finetuner.params import trainable_blocks
from zo_finetuner.plan import planned_method
from zo_finetuner.prediction import method_bytes

GIB = 1 << 30


def require_fits(config: RunConfig) -> None:
    """InputError where a run on all weights of a model cannot fit the GPU, or without one this machine's memory.
    Nothing is said of adapters, of quantised bases and of a model that cannot be made from its config alone."""
    if config.make_adapter() is not None or config.quantize:
        return
    try:
        model = empty_model(config.model, config.dtype)
    except InputError:  # who loads it says what is wrong
        return
    blocks = trainable_blocks(model)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    kept = method_bytes(planned_method(config.optimizer, model, blocks, config.batch_size, config.set), blocks)
    device = present_gpu() or _host()
    if not device.holds(weights + kept):
        beside = "" if device.holds(weights) else ", and the weights alone do not fit"
        raise InputError(
            f"model {config.model}: {config.optimizer} keeps {kept / GIB:.1f} GiB beside {weights / GIB:.1f} GiB of "
            f"weights, {device.name} has {device.memory:.1f} GiB{beside}: see `zo plan` for methods and adapters that "
            f"need less"
        )


def _host() -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Device("this machine", memory, 0, 0, 0, measured=True)
