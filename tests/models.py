"""Tiny random models of six architectures (tied and untied embeddings, biases, grouped heads), for any dtype."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 97
_COMMON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=64)
_GLU = dict(**_COMMON, num_key_value_heads=2, intermediate_size=64)

BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GLU)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_GLU, tie_word_embeddings=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GLU)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GLU)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GLU, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GLU, head_dim=8, final_logit_softcapping=5.0, attn_logit_softcapping=20.0)
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name]().to(dtype).eval()


def tokens(rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


WORDS = "<pad> <s> </s> <unk> It was great terrible the film plot acting good bad fine dull warm cold and . ,".split()


def save_model(folder, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A tiny tied Llama and a word-level tokenizer in Hugging Face format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )
    torch.manual_seed(seed)
    config = LlamaConfig(**(_GLU | dict(vocab_size=len(WORDS))), tie_word_embeddings=True, pad_token_id=0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(folder, train: int = 48, validation: int = 24, seed: int = 0):
    """SST-2 rows over the words above; the label is the mood of the adjectives."""
    import json
    import random

    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", validation)):
        lines = []
        for i in range(count):
            label = i % 2
            words = ("good", "fine", "warm") if label else ("bad", "dull", "cold")
            nouns = ("film", "plot", "acting")
            text = " and ".join(f"the {rng.choice(nouns)} was {rng.choice(words)}" for _ in range(rng.randint(1, 3)))
            lines.append(json.dumps({"sentence": text + " .", "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
