"""A tree of numbers and tensors in one safetensors file: what a run needs to go on, read without unpickling anything.

    tensors     "0", "1", ..., in the order in which the tree has them
    metadata    "tree": JSON; {"tensor": 3} stands for a tensor and {"items": [[key, value], ...]} for a dictionary
                "digest": BLAKE2s of that text and of all tensors: a bit that flipped is not taken for a number

Lists and tuples come back as lists.  (torch.load would do for honest files; with weights_only it runs no code, but a
pickle of 400 KB can still end the process, and one that lies about a shape fill the memory.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from zo_finetuner.errors import InputError
from zo_finetuner.files import write_bytes
from zo_finetuner.reading import parse_json
from zo_finetuner.tensor_files import read_header

MOST_BYTES = 4 << 30


def write_state(path: Path, tree: Any) -> None:
    """Replace the file at once.  tree: dicts (of text or whole numbers), lists, tensors, texts, numbers and None.

    Raises InputError for what the disk refuses, TypeError for another tree."""
    tensors: list[Tensor] = []
    text = json.dumps(_packed(tree, tensors))
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    write_bytes(path, save(named, metadata={"tree": text, "digest": digest(text, tensors)}))


def read_state(path: Path, mend: str) -> Any:
    """The tree in a file, its tensors on the CPU.  Raises InputError naming the file."""
    header = read_header(path, MOST_BYTES)
    try:
        with safe_open(path, framework="pt") as content:
            tensors = [content.get_tensor(str(i)).clone() for i in range(len(header.tensors))]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {mend}") from None
    text = header.metadata.get("tree", "")
    if header.metadata.get("digest") != digest(text, tensors):
        raise InputError(f"{path}: is damaged, its digest is another; {mend}")
    return _unpacked(parse_json(text, str(path), mend, finite=False), _taker(path, tensors, mend))


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().to("cpu", copy=True).contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError("a key that is neither text nor a whole number")
        return {"items": [[key, _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_packed(inner, tensors) for inner in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"a {type(value).__name__} in a state")


def _unpacked(value: Any, tensor: Callable[[Any], Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(inner, tensor) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"items"} and isinstance(value["items"], list):
        try:
            return {key: _unpacked(inner, tensor) for key, inner in value["items"]}
        except (TypeError, ValueError):  # not pairs, or a key that is a list
            return tensor(None)
    return tensor(value.get("tensor"))


def _taker(path: Path, tensors: list[Tensor], mend: str) -> Callable[[Any], Tensor]:
    def take(number: Any) -> Tensor:
        if type(number) is not int or not 0 <= number < len(tensors):
            raise InputError(f"{path}: holds what is neither a value, a dictionary nor a tensor; {mend}")
        return tensors[number]

    return take


def digest(text: str, tensors: list[Tensor]) -> str:
    """BLAKE2s, in hexadecimal, of a text and of the dtypes, shapes and bytes of tensors on the CPU."""
    total = hashlib.blake2s(text.encode("utf-8", "surrogatepass"))
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
