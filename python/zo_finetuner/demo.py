"""`zo demo`: the whole story in four minutes, from nothing but this repository.

1. Generate film reviews from a small grammar: each has a hidden mood, all of its adjectives agree with it.
2. Pretrain a tiny Llama on them (first order, under a minute).  "great" and "terrible" occur too, but at random: the
   model learns what moods are, and nothing of how they are to be named.
3. Fine-tune it with forward passes only to answer `{review} It was` by " great" or " terrible", which it could not
   do: once with MeZO, once with ZO Fine-tuner, through the same `train` as `zo train`.
4. Print the numbers and draw the curves.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from zo_finetuner.config import RunConfig
from zo_finetuner.errors import InputError
from zo_finetuner.files import make_folder, write_json, write_text
from zo_finetuner.report_page import write_report
from zo_finetuner.runs import read_run
from zo_finetuner.training import train

NOUNS = "plot story script acting music ending cast pacing humor camera dialogue hero villain scenery opening".split()
GOOD = "warm clever bright fresh funny tender rich sharp lively graceful gripping honest sweet brilliant".split()
BAD = "cold stupid dull stale boring clumsy poor flat lifeless awkward tedious fake bitter dreadful".split()
LABELS = ("terrible", "great")
PRETRAIN_STEPS, PRETRAIN_BATCH = 500, 64
STEPS = 1500
# Learning rates picked on dev rows, one seed, three values each (bench/LOG.md).
RATES = {"mezo": 3e-4, "zo-finetuner": 1e-3}


def review(mood: int, rng: random.Random) -> str:
    """Two to four clauses of one mood (0 bad, 1 good), word by word separated by spaces."""
    words = GOOD if mood else BAD
    clauses = [f"the {rng.choice(NOUNS)} was {rng.choice(words)}" for _ in range(rng.randint(2, 4))]
    return rng.choice((" and ", " , ")).join(clauses) + " ."


def pretraining_text(rng: random.Random) -> str:
    """A review, and half of the time a verdict that has nothing to do with it."""
    text = review(rng.randint(0, 1), rng)
    return f"{text} It was {rng.choice(LABELS)} ." if rng.random() < 0.5 else text


def make_data(folder: Path, seed: int) -> None:
    """train.jsonl (1,500 rows) and validation.jsonl (500 rows) with SST-2's field names."""
    make_folder(folder)
    rng = random.Random(seed)
    for split, count in (("train", 1500), ("validation", 500)):
        moods = [rng.randint(0, 1) for _ in range(count)]
        rows = [{"sentence": review(mood, rng), "label": mood} for mood in moods]
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer() -> Any:
    """One token per word of the grammar."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "was", "and", ",", ".", "It", *LABELS, *NOUNS, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )


def pretrain(folder: Path, seed: int) -> float:
    """A two-layer Llama of 0.1 M parameters on the generated text (AdamW), saved to `folder`; returns its last loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )
    rng = random.Random(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN_STEPS)
    bar = tqdm(range(PRETRAIN_STEPS), desc="pretrain (first order)")
    for _ in bar:
        texts = [pretraining_text(rng) + " </s>" for _ in range(PRETRAIN_BATCH)]
        batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


def run_demo(out: Path, *, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
    """Everything above into `out` (made anew); returns and writes summary.json.  Raises InputError for a folder in
    use that is no earlier demo."""
    if out.exists() and any(out.iterdir()) and not (out / "demo").is_dir():
        raise InputError(f"{out}: is not empty and holds no demo; choose another --output-dir")
    started = time.perf_counter()
    model, data = out / "demo" / "model", out / "demo" / "data"
    make_data(data, seed)
    pretrain(model, seed)
    results = {}
    for optimizer, rate in RATES.items():
        print(f"\n{LABEL[optimizer]}: {steps} steps, two forwards each, no backward pass")
        config = RunConfig(
            model=str(model), task="sst2", data=str(data), output_dir=str(out / optimizer), optimizer=optimizer,
            steps=steps, lr=rate, seed=seed, num_train=1200, num_dev=300, num_eval=500, eval_steps=max(1, steps // 15),
            logging_steps=max(1, steps // 15), overwrite=True,
        )
        results[optimizer] = train(config)
    prior = results["mezo"]["prior_loss"]
    write_report([read_run(out / optimizer) for optimizer in RATES], out / "report.html", out / "curves.png")
    summary = {
        "seconds": time.perf_counter() - started,
        "prior_loss": prior,
        **{name: {k: r[k] for k in SHOWN} for name, r in results.items()},
    }
    write_json(out / "summary.json", summary)
    print(_table(results, prior))
    print(f"curves: {out / 'curves.png'}, {out / 'report.html'}    in all: {summary['seconds']:.0f} s")
    return summary


LABEL = {"mezo": "MeZO", "zo-finetuner": "ZO Fine-tuner (nets freshly initialised, not learned)"}
SHOWN = ("eval_loss_before", "eval_loss_after", "eval_metric_before", "eval_metric_after", "forwards", "seconds")


def _table(results: dict[str, dict[str, Any]], prior: float) -> str:
    lines = ["", f"{'500 held-out reviews':<56}{'accuracy':>18}{'loss':>18}{'seconds':>9}"]
    for name, r in results.items():
        lines.append(
            f"{LABEL[name]:<56}{r['eval_metric_before']:>8.3f} -> {r['eval_metric_after']:.3f}"
            f"{r['eval_loss_before']:>9.3f} -> {r['eval_loss_after']:.3f}{r['seconds']:>9.0f}"
        )
    lines.append(f"{'always the training prior':<56}{'':>18}{prior:>18.3f}")
    return "\n".join(lines)
