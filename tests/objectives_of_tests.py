"""Objectives for `test_own_objective`: what a user might write, and what goes wrong in it."""

from __future__ import annotations

import random

import numpy as np
import torch

CALLS = []


def loss(model, batch):
    """The model's own loss on the labels."""
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss


def accuracy(model, tokenizer, batch):
    """Of the words "terrible" (0) and "great" (1) at the prompt's end, for rows of SST-2."""
    ids = tokenizer.convert_tokens_to_ids(["terrible", "great"])
    logits = model(batch["prompt_ids"], attention_mask=batch["prompt_mask"]).logits[:, -1, ids]
    return (logits.argmax(1).tolist() == np.array([row["label"] for row in batch["rows"]])).mean()


def written(model, batch):
    """Remembers what is generated with a cache; its value is a sum of the tokens."""
    ids = model.generate(
        input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=6, do_sample=False,
        use_cache=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    CALLS.append(ids)
    return ids.float().mean()


def drawn(model, batch):
    CALLS.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    return sum(CALLS[-1])


class Shaped:
    def __call__(self, model, batch):
        return torch.zeros(len(batch["rows"]))

    @staticmethod
    def best(model, batch, scale=2.0):
        return np.float32(scale)


shaped = Shaped()
number = 3


def nothing(model, batch):
    pass


def infinite(model, batch):
    return float("nan")


def one(model):
    return 1.0


def fails(model, batch):
    return _deeper(batch["rows"])


def _deeper(rows):
    return rows[0]["no such column"]


def fails_later(model, batch):
    """In the fifth call: the trial, the evaluation before and the first step have gone well."""
    CALLS.append(None)
    return 1 / (len(CALLS) < 5)


def fails_in_a_library(model, batch):
    return torch.zeros(3) @ torch.zeros(4)
