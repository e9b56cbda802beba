"""Files of learned optimizers: safetensors with a JSON card, and the published `.pth` (read, never executed).

A safetensors file holds the fp32 tensors of a PertNN (recipe "paper") or of a ScaleNet (the other recipes), see
`_layout`, and one metadata entry, `zo_finetuner.pertnn`: the card, which names the N blocks in order. The same
networks and card give the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zo_finetuner.cards import Card
from zo_finetuner.errors import InputError
from zo_finetuner.files import write_bytes
from zo_finetuner.pertnn import INPUTS, PertNN
from zo_finetuner.reading import open_file, shown
from zo_finetuner.restricted_pickle import MAX_FILE, Module, describe, read_torch_file
from zo_finetuner.scale_net import FEATURES, STATIC, ScaleNet
from zo_finetuner.tensor_files import read_header

METADATA_KEY = "zo_finetuner.pertnn"

SMALLEST_LOG = -87.0  # exp of less is 0 or subnormal in fp32
_MAX_BYTES = 2 * MAX_FILE  # of a safetensors file: the largest fp16 .pth, converted


def load_pertnn(path: str | os.PathLike) -> tuple[PertNN | ScaleNet, Card]:
    """The networks (fp32, CPU) and the card of a learned optimizer; the first bytes tell the kind of file.

    A published `.pth` is read as data, by `restricted_pickle`; fp16 networks become fp32 exactly.
    Raises: InputError naming the file, when it is missing, damaged, hostile, newer than this release, of
    another architecture, or not finite.
    """
    path = Path(path)
    with open_file(path) as stream:
        head = stream.read(9)
    if head.startswith(b"PK"):
        nets, card = _load_published(path)
    elif head[8:] == b"{":
        nets, card = _load_safetensors(path)
    else:
        raise InputError(f"{path}: neither a safetensors file nor a torch.save zip (a .pth since torch 1.6); "
                         "fetch the file again")
    _require_sound(nets, path)
    if isinstance(nets, ScaleNet) and card.sigma:
        _require_same_scales(nets, card, path)
    return nets, card


def save_pertnn(path: str | os.PathLike, nets: PertNN | ScaleNet, card: Card) -> None:
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
    Card.from_json(text, path).require_runnable(path)
    layout = _layout(card)
    tensors = {label: tensor.detach().cpu().contiguous() for label, tensor in nets.state_dict().items()}
    if {label: list(tensor.shape) for label, tensor in tensors.items()} != layout:
        raise InputError(f"{path}: a {type(nets).__name__} is no optimizer of recipe {card.recipe!a}")
    content = safetensors_bytes(tensors, metadata={METADATA_KEY: text})
    if len(content) > _MAX_BYTES:
        raise InputError(f"{path}: would have {len(content)} bytes, at most {_MAX_BYTES} are read back")
    write_bytes(path, content)


def _layout(card: Card) -> dict[str, list[int]]:
    """Names and shapes of a file's tensors."""
    n, hidden = len(card.names), card.hidden
    if card.recipe == "paper":
        return {"w1": [n, hidden, len(INPUTS)], "b1": [n, hidden], "w2": [n, hidden], "b2": [n]}
    return {"x": [n, len(STATIC)], "log_base": [n], "kept": [n],
            "w1": [hidden, len(FEATURES)], "b1": [hidden], "w2": [hidden]}


def _load_safetensors(path: Path) -> tuple[PertNN | ScaleNet, Card]:
    header = read_header(path, _MAX_BYTES)
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise InputError(f'{path}: no card (metadata "{METADATA_KEY}"): not a learned optimizer')
    card = Card.from_json(text, path)
    card.require_runnable(path)
    layout = _layout(card)
    found = {label: (tensor.dtype, list(tensor.shape)) for label, tensor in header.tensors.items()}
    if found != {label: ("F32", shape) for label, shape in layout.items()}:
        raise InputError(f"{path}: holds {shown(found, 300)}, its card asks for F32 {layout}; export the file again")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: what safetensors returns is mapped from the file, and changes with it.
            tensors = {label: file.get_tensor(label).clone() for label in layout}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error}); fetch it again") from error
    kind = PertNN if card.recipe == "paper" else ScaleNet
    return kind(card.names, **tensors, source=str(path)), card


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
    card = Card(source=f"published file {shown(path.name, 255)} ({folder[:200]!a})", noise_contract=0, hidden=hidden,
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


def _require_name(name: str, path: Path) -> None:
    if not name.isprintable() or not 0 < len(name) <= 512:
        raise InputError(f"{path}: {name[:80]!a} is no name of a tensor")


def _require_sound(nets: PertNN | ScaleNet, path: Path) -> None:
    """Printable names, at least one network, and finite weights."""
    for name in nets.names:
        _require_name(name, path)
    n = len(nets.names)
    if n == 0 or nets.hidden == 0:
        raise InputError(f"{path}: {n} networks of {nets.hidden} hidden units; there is nothing to run")
    if isinstance(nets, ScaleNet):
        _require_sound_scales(nets, path)
        return
    finite = [parameter.detach().isfinite().reshape(n, -1).all(dim=1) for parameter in nets.parameters()]
    bad = (~torch.stack(finite).all(dim=0)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{path}: NaN or infinite weights in the network of {nets.names[bad[0]]} "
                         f"({len(bad)} of {n} networks); learn or fetch it again")


def _require_sound_scales(nets: ScaleNet, path: Path) -> None:
    for label, tensor in nets.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: NaN or infinite numbers in {label}; learn it again")
    if not ((nets.kept == 0) | (nets.kept == 1)).all() or not nets.kept.any():
        raise InputError(f'{path}: "kept" is not 0 or 1 for every block, with one 1 at least; learn it again')


def _require_same_scales(nets: ScaleNet, card: Card, path: Path) -> None:
    """InputError where the scales that the card shows cannot be those of the tensors, whatever the base model: they are
    nu kept_b exp(log_base_b + w) with |w| <= sum |w2|, and one nu for all."""
    kept, sigma = nets.kept != 0, torch.tensor(card.sigma, dtype=torch.float64)
    vanished = nets.log_base.detach() < SMALLEST_LOG  # exp(log_base) may be 0 in fp32
    wrong = ((sigma > 0) & ~kept) | ((sigma == 0) & kept & ~vanished)
    if wrong.any():
        name, what = nets.names[int(wrong.int().argmax())], "kept" if kept[wrong][0] else "skipped"
        raise InputError(f'{path}: the card says that the scale of {name} is {sigma[wrong][0]:g}, the tensors that the '
                         f"block is {what}; learn it again")
    free = (sigma > 0) & kept
    log_nu = sigma[free].log() - nets.log_base.detach().double()[free]
    reach = 2 * float(nets.w2.detach().double().abs().sum()) + 1e-3  # the card has six digits
    if len(log_nu) and float(log_nu.max() - log_nu.min()) > reach:
        raise InputError(f'{path}: "sigma" in the card does not follow from the tensors: by the ratios of '
                         f"{nets.names[int(free.nonzero()[log_nu.argmax()])]} and "
                         f"{nets.names[int(free.nonzero()[log_nu.argmin()])]}; learn it again")
