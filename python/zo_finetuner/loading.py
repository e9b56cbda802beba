"""A model and its tokenizer from a folder or the Hub, with faults told in one line before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_finetuner.errors import InputError

INTEGER_DTYPES = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}


def load_model(source: str, dtype: str = "auto", *, lora_rank: int = 0, lora_alpha: int = 16) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer).  source: a local folder in Hugging Face format, or a Hub id.

    dtype: "auto" keeps the checkpoint's.  lora_rank > 0 wraps the model in a PEFT LoRA adapter, whose weights alone
    are trained.  Raises InputError: a missing file, truncated or integer weights, an unknown architecture."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    folder = Path(source)
    if folder.exists() or source.startswith((".", "/", "~")):
        check_folder(folder)
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {source}: cannot be loaded ({reason[:300]})") from None
    if lora_rank:
        model = _with_lora(model, lora_rank, lora_alpha)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def _with_lora(model: nn.Module, rank: int, alpha: int) -> nn.Module:
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise InputError("lora_rank is set, but peft is not installed: pip install peft") from None
    try:
        return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha))
    except ValueError as error:
        raise InputError(f"LoRA: {' '.join(str(error).split())[:300]}") from None


def check_folder(folder: Path) -> None:
    """Raise InputError unless the folder holds a config, a tokenizer and whole safetensors files of floats."""
    if not folder.is_dir():
        raise InputError(f"model {folder}: no such folder")
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"model {folder}: config.json is missing; give a folder in Hugging Face format")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config}: is not valid JSON ({error})") from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"model {folder}: no tokenizer (tokenizer.json); copy the base model's into the folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: is not a valid index (no weight_map); download it again") from None
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model {folder}: no .safetensors file; convert the weights with model.save_pretrained()")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Raise InputError when the file is missing, shorter or longer than its header says, or holds integer weights.
    Reads the header only."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, 100 << 20):
                raise InputError(f"{file}: is not a safetensors file, or is truncated; download it again")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: has no valid safetensors header; download it again") from None
    if size != 8 + length + end:
        raise InputError(f"{file}: holds {size:,} bytes but its header needs {8 + length + end:,}; download it again")
    integer = next((name for name, entry in tensors.items() if entry.get("dtype") in INTEGER_DTYPES), None)
    if integer is not None:
        raise InputError(
            f"{file}: tensor {integer} is {tensors[integer]['dtype']}: zeroth-order steps move floating weights; "
            f"use the bfloat16 checkpoint, or train a LoRA adapter from Python (peft.get_peft_model)"
        )
