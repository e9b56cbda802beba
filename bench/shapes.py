"""The parameter lists of real models, (name, shape) in the order of `named_parameters()`, from their public configs.

    llama-1b   Llama-3.2-1B    1,235,814,400 parameters   2.5 GB in 16 bits   tied head
    llama-8b   Llama-3.1-8B    8,030,261,248             16.1 GB
    opt-30b    OPT-30B        29,974,540,288             59.9 GB              tied head, biases
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Config:
    vocab: int
    hidden: int
    layers: int
    ffn: int
    kv: int  # rows of k_proj and v_proj: key-value heads times head size
    head: int  # size of an attention head
    tied: bool = False
    positions: int = 0  # learned position embeddings (OPT), its offset of 2 included


CONFIGS = {
    "llama-1b": Config(vocab=128256, hidden=2048, layers=16, ffn=8192, kv=512, head=64, tied=True),
    "llama-8b": Config(vocab=128256, hidden=4096, layers=32, ffn=14336, kv=1024, head=128),
    "opt-30b": Config(vocab=50272, hidden=7168, layers=48, ffn=28672, kv=7168, head=128, tied=True, positions=2050),
}
#: Sizes that recipes have and benchmarks do not.
SMALL = {
    "opt-125m": Config(vocab=50272, hidden=768, layers=12, ffn=3072, kv=768, head=64, tied=True, positions=2050),
    "opt-1.3b": Config(vocab=50272, hidden=2048, layers=24, ffn=8192, kv=2048, head=64, tied=True, positions=2050),
}


def shapes(model: str, shrink: int = 1) -> Shapes:
    """The list of one of CONFIGS; `shrink` divides every width and the number of layers, for dry runs."""
    config = CONFIGS[model]
    vocab, hidden, ffn, kv, positions = (
        math.ceil(width / shrink) for width in (config.vocab, config.hidden, config.ffn, config.kv, config.positions)
    )
    layer = _opt_layer(hidden, ffn) if config.positions else _llama_layer(hidden, ffn, kv)
    root, layers = ("model.decoder.", "model.decoder.layers") if config.positions else ("model.", "model.layers")
    named: Shapes = [(f"{root}embed_tokens.weight", (vocab, hidden))]
    if config.positions:
        named.append((f"{root}embed_positions.weight", (positions, hidden)))
        named += [(f"{root}final_layer_norm.{part}", (hidden,)) for part in ("weight", "bias")]
    for i in range(math.ceil(config.layers / shrink)):
        named += [(f"{layers}.{i}.{name}", shape) for name, shape in layer]
    if not config.positions:
        named.append((f"{root}norm.weight", (hidden,)))
    if not config.tied:
        named.append(("lm_head.weight", (vocab, hidden)))
    return named


def _llama_layer(hidden: int, ffn: int, kv: int) -> Shapes:
    return [
        ("self_attn.q_proj.weight", (hidden, hidden)),
        ("self_attn.k_proj.weight", (kv, hidden)),
        ("self_attn.v_proj.weight", (kv, hidden)),
        ("self_attn.o_proj.weight", (hidden, hidden)),
        ("mlp.gate_proj.weight", (ffn, hidden)),
        ("mlp.up_proj.weight", (ffn, hidden)),
        ("mlp.down_proj.weight", (hidden, ffn)),
        ("input_layernorm.weight", (hidden,)),
        ("post_attention_layernorm.weight", (hidden,)),
    ]


def _opt_layer(hidden: int, ffn: int) -> Shapes:
    sizes = {
        **{f"self_attn.{p}_proj": (hidden, hidden) for p in ("k", "v", "q", "out")},
        "self_attn_layer_norm": (hidden,),
        "fc1": (ffn, hidden),
        "fc2": (hidden, ffn),
        "final_layer_norm": (hidden,),
    }
    return [(f"{n}.{p}", s if p == "weight" else s[:1]) for n, s in sizes.items() for p in ("weight", "bias")]


def numel(named: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in named)
