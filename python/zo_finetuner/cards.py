"""The card of a learned optimizer: what it is, where it comes from, which model it was learned for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.pertnn import INPUTS
from zo_finetuner.quantised import parts
from zo_finetuner.reading import is_plain, parse_json, shown
from zo_finetuner.scale_net import FEATURES
from zo_kernels import NOISE_VERSION

FORMAT_VERSION = 1
#: What each recipe's networks read.
RECIPES = {"paper": INPUTS, "improved": FEATURES, "closed-form": FEATURES, "forward": FEATURES}

_MAX_TEXT = 4096  # characters of a field, a name or a metric
_MAX_CARD = 4 << 20  # characters; OPT-30B's card has 37,000
_SAMPLE = 256  # leading elements of every parameter that a fingerprint reads


@dataclass(frozen=True)
class Card:
    """Stored as JSON, one key per field; `save_pertnn` fills in `names` and `hidden`."""

    source: str  # "published file X", "fresh, seed 3", "zo learn"
    base_model: str = ""  # free text, e.g. a Hugging Face name
    base_fingerprint: str = ""  # `fingerprint` of the base model, or empty
    recipe: str = "paper"
    inputs: tuple[str, ...] = INPUTS
    hidden: int = 64
    noise_contract: int = 1  # version of the noise it was learned with; 0: the generators of torch
    tasks: tuple[str, ...] = ()
    metrics: dict[str, float | int | str] = field(default_factory=dict)
    curve: tuple[float, ...] = ()  # meta loss on held-out rows: before learning, then after every window
    sigma: tuple[float, ...] = ()  # normalised scale of every block at the base weights, in the order of `names`
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
        card = parse_json(text, f"{path}: the card", "export the file again")
        if not isinstance(card, dict) or type(card.get("format_version")) is not int:
            raise InputError(f'{path}: the card has no whole number "format_version"; export the file again')
        if card["format_version"] != FORMAT_VERSION:
            raise InputError(f'{path}: "format_version" {shown(card["format_version"])} in the card, this release '
                             f"reads {FORMAT_VERSION}; update zo-finetuner, or export the file again")
        known = {entry.name: entry for entry in fields(cls)}
        for key, value in card.items():
            if key not in known:
                raise InputError(f"{path}: unknown key {key[:80]!a} in the card{nearest(key[:80], known)}")
            if not _fits(known[key].type, value):
                raise InputError(f'{path}: "{key}" in the card is not of type {known[key].type}')
            if not _is_printable(value):
                raise InputError(f'{path}: "{key}" in the card is no text in one line of at most {_MAX_TEXT} '
                                 "characters; export the file again")
        for key in ("source", "names", "hidden", "inputs", "recipe"):
            if key not in card:
                raise InputError(f'{path}: the card has no "{key}"; export the file again')
        return cls(**{key: tuple(entry) if type(entry) is list else entry for key, entry in card.items()})

    def require_runnable(self, path: str | os.PathLike) -> None:
        """Raises: InputError for a recipe, inputs or a number of scales that this release does not run."""
        if self.recipe not in RECIPES:
            raise InputError(f"{path}: recipe {self.recipe[:80]!a}{nearest(self.recipe, RECIPES)}; "
                             f"this release runs {', '.join(RECIPES)}")
        if self.inputs != RECIPES[self.recipe]:
            raise InputError(f"{path}: its networks read {list(self.inputs)!a}, "
                             f"those of this release {list(RECIPES[self.recipe])}")
        if self.sigma and len(self.sigma) != len(self.names):
            raise InputError(f'{path}: "sigma" in the card has {len(self.sigma)} numbers for {len(self.names)} blocks')
        if self.sigma and min(self.sigma) < 0:
            name = self.names[self.sigma.index(min(self.sigma))]
            raise InputError(f'{path}: "sigma" of {name} in the card is negative ({min(self.sigma):g}); learn it again')
        if not re.fullmatch("(shapes:[0-9a-f]{16} weights:[0-9a-f]{16})?", self.base_fingerprint):
            raise InputError(f'{path}: "base_fingerprint" {self.base_fingerprint[:80]!a} in the card is no fingerprint '
                             "of a model; learn it again")
        if not 0 <= self.noise_contract <= NOISE_VERSION:
            raise InputError(f'{path}: "noise_contract" {shown(self.noise_contract)} in the card, this release knows '
                             f"up to {NOISE_VERSION}; update zo-finetuner")


def _fits(annotation: str, value: object) -> bool:
    """Whether a JSON value can be the field of that annotation."""
    if annotation.startswith("tuple[str"):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if annotation.startswith("tuple[float"):
        return isinstance(value, list) and all(type(entry) in (int, float) and _is_metric(entry) for entry in value)
    if annotation.startswith("dict"):
        return isinstance(value, dict) and all(map(_is_metric, value.values()))
    return type(value).__name__ == annotation


def _is_metric(value: object) -> bool:
    return type(value) is str or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


def _is_printable(value: object) -> bool:
    """Whether all texts in a field can be shown: a terminal obeys control characters."""
    texts = [value] if type(value) is str else value if isinstance(value, list) else []
    texts = texts if not isinstance(value, dict) else [*value, *value.values()]
    return all(is_plain(text) and len(text) <= _MAX_TEXT for text in texts if type(text) is str)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """"shapes:<16 hex> weights:<16 hex>": BLAKE2s of the names and shapes of all parameters, and of the first 256
    elements of each in fp32 (so that one checkpoint in fp32 and in bf16 differ only by its rounding)."""
    shapes, weights = hashlib.blake2s(digest_size=8), hashlib.blake2s(digest_size=8)
    for name, parameter in model.named_parameters():
        shapes.update(f"{name} {tuple(parameter.shape)}\n".encode())
        for part in parts(parameter.detach()):
            weights.update(part.flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return f"shapes:{shapes.hexdigest()} weights:{weights.hexdigest()}"


def same_shapes(one: str, other: str) -> bool:
    """Whether two fingerprints are of models with the same names and shapes."""
    return one.split(" ")[0] == other.split(" ")[0]
