"""Random models, encoded rows, and what their losses must be: full logits, one unpadded sequence at a
time."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_finetuner.encoding import Encoded

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = COMMON | {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
# Large initial weights, so that logits spread and a wrong position or a missing soft cap shows.
CONFIGS = {
    "Llama": GATED,
    "Mistral": GATED | {"sliding_window": 4},
    "Qwen2": GATED | {"tie_word_embeddings": True},
    "Gemma": GATED | {"head_dim": 8},
    "Gemma2": GATED | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "OPT": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3},
    "GPT2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    },
}


def make(name, attention=None, **changes):
    """attention: "sdpa", "eager", or the architecture's own choice."""
    torch.manual_seed(1)
    name, _, variant = name.partition(" ")
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name] | VARIANTS.get(variant, {}) | changes)
    if attention:
        config._attn_implementation = attention
    return getattr(transformers, kind)(config).eval()


# Layers that differ within a model under SDPA: Gemma 2, the other such model, has eager attention only.
VARIANTS = {"mixed": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}}
# Every model with every attention it has.
MODELS = [(name, attention) for name in (*CONFIGS, "Qwen2 mixed") for attention in ("sdpa", "eager")]
MODELS.remove(("Gemma2", "sdpa"))


def row(kind, prompt_length, options, label, seed):
    """An encoded row of random prompt tokens and these options."""
    generator = torch.Generator().manual_seed(seed)
    prompt = tuple(torch.randint(3, VOCABULARY, (prompt_length,), generator=generator).tolist())
    sequences = tuple(prompt + tuple(option) for option in options)
    return Encoded(kind, sequences, tuple(len(o) for o in options), (label,), prompt)


SINGLE = [row("classification", n, [[11], [7]], n % 2, n) for n in (5, 12, 9)]
SEVERAL = [row("classification", n, [[11], [7, 8, 9], [4, 5]], n % 3, n) for n in (5, 12, 9)]
ANSWERS = [row("generation", n, [range(20, 20 + k)], 0, n) for n, k in ((5, 1), (12, 4), (9, 2))]


def reference_scores(model, encoded):
    """Mean log-probability per option token, one unpadded sequence at a time, from full logits."""
    scores = []
    for sequence, length in zip(encoded.sequences, encoded.option_lengths, strict=True):
        logits = model(torch.tensor([sequence])).logits[0, -len(sequence) :]  # virtual tokens may come before
        log_probs = logits[:-1].log_softmax(-1)
        targets = torch.tensor(sequence[1:])
        scores.append(log_probs.gather(1, targets[:, None])[-length:].mean())
    return torch.stack(scores)


def reference_loss(model, encodeds):
    return sum(F.cross_entropy(reference_scores(model, e), torch.tensor(e.labels[0])) for e in encodeds)


def rounding(model, encodeds):
    """What the order of fp32 sums may change of `reference_loss`: an ulp of each row's largest score, of which its loss
    is a difference."""
    return sum(reference_scores(model, e).abs().max().item() for e in encodeds) * 2**-23


def read(shared, name, count):
    lines = (shared / "data" / name / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def pretrained(shared, name):
    path = shared / "models" / name
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
