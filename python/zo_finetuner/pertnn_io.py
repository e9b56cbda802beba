"""Files of learned optimizers: safetensors with a JSON card, and the published `.pth` (read, never executed).

A safetensors file holds w1 (N, hidden, 5), b1 (N, hidden), w2 (N, hidden) and b2 (N,) in fp32, and one
metadata entry, `zo_finetuner.pertnn`: the card, which names the N blocks in order. The same networks and card
give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.files import write_bytes
from zo_finetuner.pertnn import INPUTS, PertNN
from zo_finetuner.restricted_pickle import MAX_FILE, Module, describe, read_torch_file

FORMAT_VERSION = 1
RECIPES = ("paper",)  # what `PertNN.forward` computes
METADATA_KEY = "zo_finetuner.pertnn"

_TENSORS = ("w1", "b1", "w2", "b2")
_MAX_BYTES = 2 * MAX_FILE  # of a safetensors file: the largest fp16 .pth, converted
_MAX_CARD = 4 << 20  # characters; OPT-30B's card has 37,000


@dataclass(frozen=True)
class Card:
    """What a learned optimizer is and where it comes from; stored as JSON, one key per field.

    `save_pertnn` fills in `names` and `hidden`.
    """

    source: str  # "published file X", "fresh, seed 3", "zo learn ..."
    base_model: str = ""  # free text, e.g. a Hugging Face name
    base_fingerprint: str = ""  # free text
    recipe: str = "paper"
    inputs: tuple[str, ...] = INPUTS
    hidden: int = 64
    noise_contract: int = 1  # version of the noise it was learned with; 0: the generators of torch
    tasks: tuple[str, ...] = ()
    metrics: dict[str, float | int | str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """ASCII JSON in one line. Raises: ValueError on NaN or infinity, TypeError on foreign objects."""
        card = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return json.dumps(card, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, path: str | os.PathLike) -> Card:
        """Read and check a card. Raises: InputError naming `path` and the key."""
        if len(text) > _MAX_CARD:
            raise InputError(f"{path}: the card has {len(text)} characters; at most {_MAX_CARD} are read")
        try:
            card = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: the card is not JSON ({error}); export the file again") from error
        if not isinstance(card, dict) or type(card.get("format_version")) is not int:
            raise InputError(f'{path}: the card has no whole number "format_version"; export the file again')
        if card["format_version"] != FORMAT_VERSION:
            raise InputError(f'{path}: "format_version" {card["format_version"]} in the card, this release '
                             f"reads {FORMAT_VERSION}; update zo-finetuner, or export the file again")
        known = {entry.name: entry for entry in fields(cls)}
        for key, value in card.items():
            if key not in known:
                raise InputError(f"{path}: unknown key {key[:80]!a} in the card{nearest(key, known)}")
            if not _fits(known[key].type, value):
                raise InputError(f'{path}: "{key}" in the card is not of type {known[key].type}')
        for key in ("source", "names", "hidden", "inputs", "recipe"):
            if key not in card:
                raise InputError(f'{path}: the card has no "{key}"; export the file again')
        return cls(**{key: tuple(entry) if type(entry) is list else entry for key, entry in card.items()})


def load_pertnn(path: str | os.PathLike) -> tuple[PertNN, Card]:
    """The networks (fp32, CPU) and the card of a learned optimizer; the first bytes tell the kind of file.

    A published `.pth` is read as data, by `restricted_pickle`; fp16 networks become fp32 exactly.
    Raises: InputError naming the file, when it is missing, damaged, hostile, newer than this release, of
    another architecture, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"PK"):
        nets, card = _load_published(path)
    elif head[8:] == b"{":
        nets, card = _load_safetensors(path)
    else:
        raise InputError(f"{path}: neither a safetensors file nor a torch.save zip (a .pth since torch 1.6); "
                         "fetch the file again")
    _require_sound(nets, path)
    return nets, card


def save_pertnn(path: str | os.PathLike, nets: PertNN, card: Card) -> None:
    """Write `nets` and `card` to a `.safetensors` file, whole or not at all: an old file stays until then.

    `card.names` and `card.hidden` are taken from `nets`.
    Raises: InputError naming the file, for another suffix, weights that are not finite, a card that
    `load_pertnn` would refuse, and what the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a learned optimizer is saved as .safetensors; change the suffix")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    _require_sound(nets, path)
    card = replace(card, names=nets.names, hidden=nets.hidden)
    try:
        text = card.to_json()
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: the card is no JSON ({error}); metrics are numbers or text") from error
    _require_runnable(Card.from_json(text, path), path)
    tensors = {label: getattr(nets, label).detach().cpu().contiguous() for label in _TENSORS}
    content = safetensors_bytes(tensors, metadata={METADATA_KEY: text})
    if len(content) > _MAX_BYTES:
        raise InputError(f"{path}: would have {len(content)} bytes, at most {_MAX_BYTES} are read back")
    write_bytes(path, content)


def _load_safetensors(path: Path) -> tuple[PertNN, Card]:
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; a learned optimizer has at most {_MAX_BYTES}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise InputError(f'{path}: no card (metadata "{METADATA_KEY}"): not a learned optimizer')
            card = Card.from_json(text, path)
            _require_runnable(card, path)
            n, hidden = len(card.names), card.hidden
            layout = {"w1": [n, hidden, len(INPUTS)], "b1": [n, hidden], "w2": [n, hidden], "b2": [n]}
            slices = {label: file.get_slice(label) for label in file.keys()}  # noqa: SIM118 (it is no dict)
            found = {label: (part.get_dtype(), part.get_shape()) for label, part in slices.items()}
            if found != {label: ("F32", shape) for label, shape in layout.items()}:
                raise InputError(f"{path}: holds {str(found)[:300]}, its card asks for F32 {layout}; "
                                 "export the file again")
            # Copies: what safetensors returns is mapped from the file, and changes with it.
            tensors = {label: file.get_tensor(label).clone() for label in _TENSORS}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error}); fetch it again") from error
    return PertNN(card.names, **tensors, source=str(path)), card


def _load_published(path: Path) -> tuple[PertNN, Card]:
    """`torch.save` of {tensor name: nn.Sequential(Linear(5, hidden), Tanh(), Linear(hidden, 1))}."""
    content, folder = read_torch_file(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds {describe(content)}, not a dictionary of networks by tensor name")
    networks = [_published_network(path, name, network) for name, network in content.items()]
    hidden = networks[0][0].shape[0]
    for name, network in zip(content, networks, strict=True):
        if network[0].shape[0] != hidden:
            raise InputError(f"{path}: network {name} has {network[0].shape[0]} hidden units, "
                             f"the first has {hidden}; all have the same")
    if len(networks) * (7 * hidden + 1) * 4 > _MAX_BYTES:  # networks that share a storage could multiply it
        raise InputError(f"{path}: {len(networks)} networks of {hidden} hidden units are too many")
    columns = zip(*networks, strict=True)
    w1, b1, w2, b2 = (torch.stack([tensor.float() for tensor in column]) for column in columns)
    card = Card(source=f"published file {path.name} ({folder[:200]!a})", noise_contract=0, hidden=hidden,
                names=tuple(content))
    return PertNN(card.names, w1, b1, w2.squeeze(1), b2.squeeze(1), source=str(path)), card


def _published_network(path: Path, name: str, network: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, 5), (hidden,), (1, hidden), (1,) of one network, in the file's dtype."""
    _require_name(name, path)
    layers = _part(network, "Sequential", "_modules")
    if layers is None:
        raise InputError(f"{path}: network {name} is {describe(network)}, not a Sequential of layers")
    found = ", ".join(_spell(layer) for layer in layers.values())
    hidden = _spell(next(iter(layers.values()), None)).removeprefix("Linear(5, ").removesuffix(")")
    if found != f"Linear(5, {hidden}), Tanh, Linear({hidden}, 1)":
        raise InputError(f"{path}: network {name} is ({found[:200]}); "
                         "a PertNN is (Linear(5, 64), Tanh, Linear(64, 1))")
    first, _, last = (_part(layer, "Linear", "_parameters") for layer in layers.values())
    return first["weight"], first["bias"], last["weight"], last["bias"]


def _part(module: object, kind: str, part: str) -> dict | None:
    """A dictionary in the state of a stand-in module, or None where there is no such module or dictionary."""
    if not isinstance(module, Module) or module.kind != kind or module.state is None:
        return None
    value = module.state.get(part)
    return value if isinstance(value, dict) else None


def _spell(layer: object) -> str:
    """A layer as torch prints it, but by the shapes that are really there: `Linear(5, 64)`, `Tanh`."""
    if (parameters := _part(layer, "Linear", "_parameters")) is None:
        return "Tanh" if isinstance(layer, Module) and layer.kind == "Tanh" else describe(layer)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == 2
            and bias.shape == weight.shape[:1]):
        return f"a Linear of weight {describe(weight)} and bias {describe(bias)}"
    return f"Linear({weight.shape[1]}, {weight.shape[0]})"


def _fits(annotation: str, value: object) -> bool:
    """Whether a JSON value can be the field of that annotation."""
    if annotation.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if annotation.startswith("dict"):
        return isinstance(value, dict) and all(map(_is_metric, value.values()))
    return type(value).__name__ == annotation


def _is_metric(value: object) -> bool:
    return type(value) is str or (type(value) in (int, float) and abs(value) < math.inf)


def _require_runnable(card: Card, path: Path) -> None:
    if card.recipe not in RECIPES:
        raise InputError(f"{path}: recipe {card.recipe[:80]!a}{nearest(card.recipe, RECIPES)}; "
                         f"this release runs {', '.join(RECIPES)}")
    if card.inputs != INPUTS:
        raise InputError(f"{path}: its networks read {list(card.inputs)!a}, "
                         f"those of this release {list(INPUTS)}")


def _require_name(name: str, path: Path) -> None:
    if not name.isprintable() or not 0 < len(name) <= 512:
        raise InputError(f"{path}: {name[:80]!a} is no name of a tensor")


def _require_sound(nets: PertNN, path: Path) -> None:
    """Printable names, at least one network, and finite weights."""
    for name in nets.names:
        _require_name(name, path)
    n = len(nets.names)
    if n == 0 or nets.hidden == 0:
        raise InputError(f"{path}: {n} networks of {nets.hidden} hidden units; there is nothing to run")
    finite = [getattr(nets, label).detach().isfinite().reshape(n, -1).all(dim=1) for label in _TENSORS]
    bad = (~torch.stack(finite).all(dim=0)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{path}: NaN or infinite weights in the network of {nets.names[bad[0]]} "
                         f"({len(bad)} of {n} networks); learn or fetch it again")
