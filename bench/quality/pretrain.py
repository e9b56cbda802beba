"""A better base where a GPU is at hand: a Llama of 30 to 100M parameters, trained on plain text within minutes.

    byte-level BPE from the first megabytes of the text;  AdamW, warm-up and cosine over the time that is given;
    bf16 autocast on a GPU;  saved as a Hugging Face folder, with what it was made of in pretrain.json
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zo_finetuner.errors import InputError
from zo_finetuner.files import make_folder, write_json
from zo_finetuner.learning.text import read_documents

#: size -> hidden, layers, heads, feed-forward, vocabulary.  35m and 94m parameters with 8,192 pieces, tied.
SIZES = {
    "tiny": (32, 2, 2, 64, 300),
    "35m": (512, 10, 8, 1408, 8192),
    "94m": (768, 12, 12, 2048, 8192),
}
CONTEXT, WARM_UP, DECAY, CLIP = 512, 0.03, 0.1, 1.0
TOKENIZER_DOCUMENTS, BYTES = 8000, 64 << 20


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a base to begin with")
    group.add_argument("--pretrain", type=Path, metavar="TEXT", help="train a base on a .txt, .txt.xz, .jsonl, folder")
    group.add_argument("--out-model", type=Path, metavar="DIR", help="where the base goes, outside of the repository")
    group.add_argument("--minutes", type=float, default=5.0, help="for the training alone (default: 5)")
    group.add_argument("--size", choices=SIZES, default="35m", help="default: 35m")
    group.add_argument("--pretrain-batch", type=int, default=64, help=f"windows of {CONTEXT} tokens (default: 64)")
    group.add_argument("--pretrain-lr", type=float, default=1.5e-3)


def pretrain(arguments: argparse.Namespace) -> int:
    """Raises InputError for a text or a folder that will not do."""
    out = arguments.out_model
    if out is None:
        raise InputError("--pretrain needs --out-model DIR")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; choose another folder, the base is never replaced")
    make_folder(out)
    documents = list(read_documents(arguments.pretrain))
    if not documents:
        raise InputError(f"{arguments.pretrain}: holds no text")
    hidden, layers, heads, feed_forward, vocabulary = SIZES[arguments.size]
    tokenizer = _tokenizer(documents, vocabulary)
    ids = _ids(tokenizer, documents)
    context = min(CONTEXT, len(ids) // 8)
    train, held_out = ids[: -16 * context // 4], ids[-16 * context // 4 :]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = _model(hidden, layers, heads, feed_forward, tokenizer).to(device)
    curve, steps = _train(model, train, context, arguments, device)
    model.eval()
    final = _loss(model, held_out[: len(held_out) // context * context].view(-1, context).to(device), device).item()
    model.float().save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "text": arguments.pretrain.name, "tokens": len(ids), "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps, "tokens_seen": steps * arguments.pretrain_batch * context, "context": context,
        "batch": arguments.pretrain_batch, "lr": arguments.pretrain_lr, "minutes": arguments.minutes, "seed": 0,
        "held_out_loss": final, "curve": curve,
    }  # fmt: skip
    write_json(out / "pretrain.json", facts)
    print(f"{out}: {facts['parameters'] / 1e6:.1f}M parameters, {facts['tokens_seen'] / 1e6:.1f}M tokens in {steps} "
          f"steps, held-out loss {final:.3f}; now: python -m bench quality --model {out}")  # fmt: skip
    return 0


def _tokenizer(documents: list[str], vocabulary: int):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>"]
    pieces.train_from_iterator(islice(documents, TOKENIZER_DOCUMENTS), vocabulary, special_tokens=special,
                               show_progress=False)  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", padding_side="left")  # fmt: skip


def _ids(tokenizer: Any, documents: list[str]) -> Tensor:
    """All documents one after the other, an end token behind each, int64."""
    pieces = []
    for start in range(0, len(documents), 1000):
        for ids in tokenizer(documents[start : start + 1000], verbose=False)["input_ids"]:
            pieces.append(torch.tensor([*ids, tokenizer.eos_token_id]))
    return torch.cat(pieces)


def _model(hidden: int, layers: int, heads: int, feed_forward: int, tokenizer: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=feed_forward, max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _train(
    model: nn.Module, ids: Tensor, context: int, arguments: argparse.Namespace, device: torch.device
) -> tuple[list[list[float]], int]:
    """Random windows until the time is over (the schedule follows the clock), or for the steps asked for.  Returns
    [step, loss] now and then, and the number of steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.pretrain_lr, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip
    ids, offsets = ids.to(device), torch.arange(context, device=device)
    compiled = torch.compile(model) if device.type == "cuda" else model
    limit, curve, step, started = 60 * arguments.minutes, [], 0, None
    bar = tqdm(total=round(limit), unit="s", desc="pretrain")
    model.train()
    while True:
        if arguments.steps:
            place = step / arguments.steps
        else:
            place = 0.0 if started is None else (time.perf_counter() - started) / limit
        if place >= 1:
            break
        warm = min(1.0, (place + 1e-3) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = arguments.pretrain_lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * place)) / 2)
        starts = torch.randint(len(ids) - context, (arguments.pretrain_batch,), device=device)
        loss = _loss(compiled, ids[starts[:, None] + offsets], device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if started is None or step % 10 == 0:
            value = loss.item()  # waits for the device, so that the clock is its own
            started = started or time.perf_counter()  # compiling takes none of the time
            curve.append([step, round(value, 4)])
            bar.update(round(time.perf_counter() - started) - bar.n)
    bar.close()
    return curve[:: max(1, len(curve) // 100)], step


def _loss(model: nn.Module, windows: Tensor, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=windows, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())
