"""A base in few bits under a floating adapter: it is only read, so any form that multiplies will do.

    int8       torchao, weights alone, on any device
    nf4, bnb-int8   bitsandbytes, on a GPU (QLoRA's 4 bits with a second quantisation of the scales; LLM.int8)
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.errors import InputError, nearest

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "bnb-int8": "bitsandbytes"}
QUANTISATIONS = tuple(PACKAGES)


def require_quantisation(name: str, what: str = "quantize") -> None:
    """InputError for an unknown name.  what: the setting that has it."""
    if name not in QUANTISATIONS:
        raise InputError(f'unknown {what} "{name}"{nearest(name, QUANTISATIONS)}; there are: '
                         f"{', '.join(QUANTISATIONS)}")


def quantisation(name: str, dtype: torch.dtype | None = None) -> Any:
    """What `from_pretrained(quantization_config=...)` takes.  dtype: of the products; None for bfloat16.  InputError
    for an unknown name and for what this machine lacks."""
    require_quantisation(name, "quantisation")
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"quantize {name}: {package} is not installed: pip install {package}")
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise InputError(f"quantize {name}: bitsandbytes needs a GPU here; int8 (torchao) runs on a CPU")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def form(tensor: Tensor) -> str:
    """How a tensor is quantised; empty for a plain floating one (or a shard of one)."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return str(tensor.dtype).removeprefix("torch.")
    kind = type(tensor.data)
    packed = hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.")  # torchao's
    return kind.__name__ if packed else ""


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a packed one is made of; a plain one itself."""
    if not form(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [part for one in inner if isinstance(one, Tensor) for part in parts(one)]


def quantised_tensor(model: nn.Module) -> tuple[str, str] | None:
    """(name, form) of the first quantised parameter; None where there is none."""
    return next(((name, form(p)) for name, p in model.named_parameters() if form(p)), None)
