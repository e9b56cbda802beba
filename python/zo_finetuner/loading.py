"""A model and its tokenizer from a folder or the Hub, with faults told in one line before anything is loaded."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_finetuner.adapters import Adapter, adapter_base, add_adapter, load_adapter
from zo_finetuner.errors import InputError, nearest
from zo_finetuner.quantised import quantisation
from zo_finetuner.reading import is_plain, read_object, require_file, shown
from zo_finetuner.tensor_files import read_header

INTEGER_DTYPES = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}
MOST_CONFIG = 16 << 20  # bytes of config.json
MOST_OTHER = 512 << 20  # bytes of any other file that is no weights; Gemma's tokenizer has 33 MB
MOST_LAYERS = 1024  # of a model, and experts of a layer; Llama 405B has 126
DTYPES = ("auto", "float32", "bfloat16", "float16")

logger = logging.getLogger(__name__)


def load_model(
    source: str,
    dtype: str = "auto",
    *,
    random_weights: bool = False,
    quantize: str | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer) on the device, by default the GPU, else the CPU.  source: a local folder in
    Hugging Face format, or a Hub id; or a folder with a saved adapter, which is put onto its base and may be trained
    on.

    dtype: "auto" keeps the checkpoint's.  random_weights: see `random_model`; the folder needs a config and a tokenizer
    only.  quantize: one of `quantised.QUANTISATIONS`, for the base.  adapter, seed: see `adapters.add_adapter`; the
    adapter's weights alone are then trained.

    A checkpoint goes to the GPU tensor by tensor from its memory-mapped files: the host holds pages of the files,
    which the kernel may drop, and at most a few tensors that are being cast.
    Raises InputError: a missing file, truncated or integer weights, an unknown architecture."""
    base = adapter_base(source)
    if base is not None and adapter is not None:
        raise InputError(f"model {source}: is an adapter already; leave --adapter, or give its base {base}")
    if device is None:
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    quantised = adapter is not None or base is not None  # they may stand on integers
    model, tokenizer = _load_whole(base or source, dtype, random_weights, quantize, device, quantised)
    if base is not None:
        model = load_adapter(model, source).to(device)
    if adapter is not None:
        model = add_adapter(model, adapter, seed)
    return model.eval(), tokenizer


def _load_whole(
    source: str, dtype: str, random_weights: bool, quantize: str | None, device: torch.device, integers: bool
) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer
    from transformers.utils import logging as hf_logging

    if _is_local(source):
        check_folder(Path(source), weights=not random_weights, integers=integers)
    hf_logging.disable_progress_bar()
    with told_as_input_error(f"model {source}: cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if random_weights:
            return random_model(source, dtype, device), tokenizer
        # Without a map the model is put together on the host, and cast there where dtypes differ.
        where = {"device_map": {"": device}} if device.type != "cpu" else {}
        if quantize:
            where["quantization_config"] = quantisation(quantize)
        return _whole_model(source, dtype=dtype, **where), tokenizer


def _whole_model(source: str, **how: Any) -> nn.Module:
    """The model with every parameter from its files.  InputError where one is missing there or has another shape, which
    transformers would draw at random; code that a folder brings along is not run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # its report of such tensors is a table
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, **how
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(f"model {source}: tensors of its files have other shapes than config.json asks for; "
                             "download both again") from None
        raise
    finally:
        hf_logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"model {source}: tensor {missing[0]} is not in its files ({len(missing)} are missing) and "
                         "would be random; download it again")
    return model


def random_model(source: str, dtype: str = "auto", device: torch.device | str = "cpu") -> nn.Module:
    """A model of `source`'s config, freshly initialised (normal with the config's `initializer_range` for matrices, as
    transformers does before pretraining) where it will be used: no checkpoint is read, no copy is made on the host.

    For throughput and memory, which depend on shapes alone; its losses mean nothing.  Draws from the device's default
    generator.  dtype "auto" is the config's, else float32.  Raises InputError."""
    model = _build(source, dtype, device)
    logger.warning(
        "weights of %s are RANDOM (std %s): good for throughput and memory, its losses mean nothing",
        source,
        getattr(model.config.get_text_config(), "initializer_range", "by transformers' default"),
    )
    return model


def empty_model(source: str, dtype: str = "auto") -> nn.Module:
    """A model of `source`'s config without storage (device meta), in eval mode.  Of a Hub id the config alone is
    fetched.  Raises InputError; a quantised checkpoint is one, its shapes are not in the config."""
    return _build(source, dtype, "meta")


def _build(source: str, dtype: str, device: torch.device | str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    require_dtype(dtype)
    if _is_local(source):
        _check_config(Path(source))
    with told_as_input_error(f"model {source}: cannot be built from its config"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantised: use the bfloat16 checkpoint's")
        kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=kind).eval()


def require_dtype(name: str) -> None:
    if name not in DTYPES:
        raise InputError(f'unknown dtype "{name}"{nearest(name, DTYPES)}; there are: {", ".join(DTYPES)}')


@contextlib.contextmanager
def told_as_input_error(what: str) -> Iterator[None]:
    """Faults that transformers finds in a model's files become one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any type: its files are read by a dozen packages, in three languages
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({shown(reason, 300)})") from None


def _is_local(source: str) -> bool:
    return Path(source).exists() or source.startswith((".", "/", "~"))


def check_folder(folder: Path, weights: bool = True, integers: bool = False) -> None:
    """Raise InputError unless the folder holds a config, a tokenizer and whole safetensors files of floats (weights
    False: no matter which; integers: or of a quantised base)."""
    _check_config(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"model {folder}: no tokenizer (tokenizer.json); copy the base model's into the folder")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja"):  # read by transformers, some of them whole
            require_file(path, MOST_OTHER)
    if not weights:
        return
    files = _weight_files(folder)
    if not files:
        raise InputError(f"model {folder}: no .safetensors file; convert the weights with model.save_pretrained()")
    for file in files:
        check_safetensors(file, integers)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    names = read_object(index, "download it again").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: is not a valid index (no weight_map); download it again")
    for tensor, name in names.items():
        # A name with a folder in it would be looked for anywhere on this machine.
        if not isinstance(name, str) or not is_plain(name) or name in ("", ".", "..") or re.search(r"[/\\]", name):
            raise InputError(f"{index}: tensor {shown(tensor)} is said to be in {shown(name)}, which is no file of "
                             "this folder; download it again")
    return [folder / name for name in sorted(set(names.values()))]


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"model {folder}: no such folder")
    config = folder / "config.json"
    if not config.exists():
        raise InputError(f"model {folder}: config.json is missing; give a folder in Hugging Face format")
    values = read_object(config, "download it again", most=MOST_CONFIG, finite=False)
    parts = {"": values} | {f"{key}.": value for key, value in values.items() if isinstance(value, dict)}
    for prefix, part in parts.items():
        for key, value in part.items():
            if re.search("attn_implementation", key) and "/" in str(value):
                raise InputError(f'{config}: "{shown(key)}" asks for code from the Hub ({shown(value)}), which is not '
                                 "run; take the line out")
            # A module is built for each before anything is compared with the weights.
            if re.search("(layers?|experts)$", key) and type(value) is int and value > MOST_LAYERS:
                name = shown(prefix + key)
                raise InputError(f'{config}: "{name}" is {shown(value)}; at most {MOST_LAYERS:,} are built')


def check_safetensors(file: Path, integers: bool = False) -> None:
    """Raise InputError when the file is missing, shorter or longer than its header says, or holds integer weights that
    are not allowed.  Reads the header only."""
    tensors = read_header(file).tensors
    integer = next((name for name, tensor in tensors.items() if tensor.dtype in INTEGER_DTYPES), None)
    if integer is not None and not integers:
        raise InputError(
            f"{file}: tensor {integer} is {tensors[integer].dtype}: zeroth-order steps move floating weights; "
            f"use the bfloat16 checkpoint, or train an adapter on it (--adapter lora)"
        )
