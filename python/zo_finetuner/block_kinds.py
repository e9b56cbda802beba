"""What a parameter block is and where it sits, read from its name: for pictures, and as inputs of a scale network."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Kinds, in the order of the network's inputs; the first pattern found in a name decides.
_PATTERNS = {
    "lora_a": r"lora_A|lora_embedding_A",
    "lora_b": r"lora_B|lora_embedding_B",
    "bias": r"\.bias$",
    "norm": r"norm|\.ln_\w+\.",
    "embedding": r"embed|\.wte\.|\.wpe\.",
    "head": r"lm_head|embed_out|output_projection",
    "qkv": r"qkv|query_key_value|c_attn",
    "q": r"q_proj|\.query\.",
    "k": r"k_proj|\.key\.",
    "v": r"v_proj|\.value\.",
    "o": r"o_proj|out_proj|attn\.c_proj|attention\.dense",
    "gate": r"gate_proj|\.gate\.|\.w1\.",
    "up": r"up_proj|fc1|c_fc|h_to_4h|\.w3\.",
    "down": r"down_proj|fc2|c_proj|4h_to_h|\.w2\.",
}
KINDS = (*_PATTERNS, "other")


def block_kind(name: str) -> str:
    """One of KINDS: `model.layers.3.self_attn.v_proj.weight` is a "v"; a name that fits nothing is "other"."""
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, name)), "other")


def by_kind(names: Sequence[str], sigma: Sequence[float]) -> dict[str, float]:
    """Root mean square over the blocks of every kind that there is, in the order of KINDS."""
    squares: dict[str, list[float]] = {}
    for name, value in zip(names, sigma, strict=True):
        squares.setdefault(block_kind(name), []).append(value * value)
    return {kind: (sum(squares[kind]) / len(squares[kind])) ** 0.5 for kind in KINDS if kind in squares}


def layer_of(name: str) -> int | None:
    """The first number between dots: the layer; None outside the layers (embedding, last norm, head)."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def depths(names: Sequence[str]) -> list[float]:
    """Relative depth of every block: 0 in the first layer, 1 in the last; embeddings -0.1, the rest outside the layers
    1.1, so that no layer is mistaken for them."""
    layers = [layer_of(name) for name in names]
    last = max((layer for layer in layers if layer is not None), default=0)
    outside = [-0.1 if block_kind(name) == "embedding" else 1.1 for name in names]
    return [x if layer is None else layer / max(last, 1) for layer, x in zip(layers, outside, strict=True)]


#: Kinds that are one group whatever their depth: few elements, or none inside the layers.
_ONE_GROUP = {"norm", "bias", "embedding", "head", "other"}


def block_groups(names: Sequence[str], most: int = 24) -> tuple[list[int], list[str]]:
    """(number of every block's group, the groups' labels): blocks of one kind in one third of the depth, or in one
    half, or anywhere, so that there are `most` groups at most."""
    for parts in (3, 2, 1):
        labels = [_group(block_kind(name), depth, parts) for name, depth in zip(names, depths(names), strict=True)]
        distinct = list(dict.fromkeys(labels))
        if len(distinct) <= most:
            break
    return [distinct.index(label) for label in labels], distinct


def _group(kind: str, depth: float, parts: int) -> str:
    if kind in _ONE_GROUP or parts == 1 or not 0 <= depth <= 1:
        return kind
    return f"{kind} {min(int(depth * parts), parts - 1) + 1}/{parts}"
