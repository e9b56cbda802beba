"""A model folder of one of `shapes.CONFIGS`: its config and a small tokenizer, no weights.

`loading.random_model` draws the weights on the device, so that a model of 60 GB needs neither disk nor host memory.
The tokenizer is another model's, whose ids are below every vocabulary here: rows are longer than under the model's own,
their lengths spread in the same way.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from bench.shapes import CONFIGS, SMALL

POSITIONS = 8192  # of the Llamas; rows of the protocol have 2,048 tokens at most


def config(model: str, shrink: int = 1, vocabulary: int = 0) -> Any:
    """The transformers config of one of CONFIGS or SMALL, weights in bfloat16.  shrink divides widths, depth and
    vocabulary for dry runs (two heads then, one of keys); vocabulary: the least that the embedding must have."""
    from transformers import LlamaConfig, OPTConfig

    shape = (CONFIGS | SMALL)[model]
    heads, kv_heads = (shape.hidden // shape.head, shape.kv // shape.head) if shrink == 1 else (2, 1)
    head = shape.head if shrink == 1 else max(2, shape.hidden // shrink // 4 * 2)  # even, for rotary embeddings
    common = {
        "vocab_size": max(vocabulary, math.ceil(shape.vocab / shrink)),
        "hidden_size": heads * head,
        "num_hidden_layers": math.ceil(shape.layers / shrink),
        "num_attention_heads": heads,
        "tie_word_embeddings": shape.tied,
        "dtype": "bfloat16",
    }
    ffn = math.ceil(shape.ffn / shrink)
    if shape.positions:
        positions = shape.positions - 2  # the embedding's offset
        return OPTConfig(**common, ffn_dim=ffn, word_embed_proj_dim=heads * head, max_position_embeddings=positions)
    return LlamaConfig(
        **common, intermediate_size=ffn, num_key_value_heads=kv_heads, head_dim=head, max_position_embeddings=POSITIONS
    )


def make_folder(model: str, folder: Path, tokenizer: Path, shrink: int = 1) -> Path:
    """Write `folder` with the config and the tokenizer's files of the folder `tokenizer`; returns it."""
    from transformers import AutoTokenizer

    config(model, shrink, len(AutoTokenizer.from_pretrained(str(tokenizer)))).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, folder / file)
    return folder
