"""Accuracy or F1, and the training loss, over a whole split.

Batches hold rows of similar length, longest first (little padding, and memory runs out at once or never);
results do not depend on the order of the rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_finetuner.encoding import (
    IGNORED,
    MAX_NEW_TOKENS,
    Encoded,
    collate,
    collate_options,
    context_length,
    encode_rows,
    pad_left,
    pad_token,
)
from zo_finetuner.errors import InputError
from zo_finetuner.greedy import continue_greedily
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import candidate_scores, option_losses
from zo_finetuner.tasks import Task, accuracy, f1
from zo_finetuner.tasks.templates import Row
from zo_finetuner.virtual_tokens import virtual_tokens


def evaluate_split(
    model: nn.Module,
    task: Task,
    examples: Sequence[Encoded] | Sequence[Row],
    tokenizer: Any,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, float]:
    """{"loss": ..., task.metric: ..., "n": ...} over rows or encoded rows.

    loss is the training objective. Classification and multiple choice: accuracy of the candidate with the
    largest mean log-probability per token. Generation: mean F1 of greedy text (`generate_answers`) over the
    best gold. batch_size counts sequences: rows where one prompt pass scores a row, else candidates; those of a
    row share its prompt where the model can pack. Raises InputError for an empty split.
    """
    if not examples:
        raise InputError(f'task "{task.name}": nothing to evaluate, the split is empty')
    if isinstance(examples[0], Encoded):
        encodeds = list(examples)
    else:
        encodeds = encode_rows(task, examples, tokenizer, context_length(model))
    pad_id = pad_token(tokenizer)
    with evaluating(model):
        if task.kind == "generation":
            loss = mean_token_loss(model, encodeds, pad_id, batch_size, progress)
            texts = generate_answers(model, encodeds, tokenizer, batch_size, progress)
            metric = sum(f1(text, e.answers) for text, e in zip(texts, encodeds, strict=True)) / len(encodeds)
        else:
            loss, predictions = _choose(model, task, encodeds, pad_id, batch_size, progress)
            metric = accuracy(predictions, [e.labels for e in encodeds])
    return {"loss": float(loss), task.metric: metric, "n": len(encodeds)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode and makes no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mean_token_loss(
    model: nn.Module, encodeds: Sequence[Encoded], pad_id: int, batch_size: int = 8, progress: bool = False
) -> float:
    """Mean negative log-probability of all target tokens of all candidates, every token counted once."""
    with evaluating(model):
        losses, counts = _option_sums(model, encodeds, pad_id, batch_size, progress)
    return float(losses.sum() / counts.sum())


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    encodeds: Sequence[Encoded],
    tokenizer: Any,
    batch_size: int = 8,
    progress: bool = False,
) -> list[str]:
    """Greedy continuation of every prompt: up to 50 new tokens, to the first newline or EOS, stripped."""
    newlines = newline_tokens(tokenizer)
    eos = {tokenizer.eos_token_id} - {None}
    pad_id = pad_token(tokenizer)
    texts = [""] * len(encodeds)
    lengths = [len(e.prompt) for e in encodeds]
    # PEFT puts virtual tokens before the padding, where a prompt's distance to them would depend on its batch.
    padded = not virtual_tokens(model).count
    for rows in batches(lengths, [1] * len(encodeds), batch_size, progress, padded):
        inputs = to_device(model, pad_left([encodeds[i].prompt for i in rows], pad_id, 8 if padded else 1))
        length = inputs["input_ids"].shape[1]
        if padded:
            continued = _generate(model, inputs, pad_id, sorted(newlines | eos))[:, length:]
        else:
            continued = continue_greedily(model, inputs["input_ids"], MAX_NEW_TOKENS, newlines | eos)
        for i, ids in zip(rows, continued.tolist(), strict=True):
            ends = [k for k, token in enumerate(ids) if token in newlines or token in eos]
            # What follows the end is padding; a newline's token may hold text before it (".\n").
            ids = ids[: ends[0] + (ids[ends[0]] in newlines)] if ends else ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            texts[i] = text.split("\n", 1)[0].strip()
    return texts


def _generate(model: nn.Module, inputs: dict[str, Tensor], pad_id: int, ends: list[int]) -> Tensor:
    # Spelt out, so that a checkpoint's own sampling or repetition penalty (Qwen2: 1.1) has no say.
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=ends,
    )


@functools.lru_cache(maxsize=8)
def newline_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of all tokens whose text holds a newline: a byte-level vocabulary has many (Llama 3: ".\\n",
    "\\n\\n")."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "\n" in text)


def _choose(
    model: nn.Module, task: Task, encodeds: list[Encoded], pad_id: int, batch_size: int, progress: bool
) -> tuple[Tensor, list[int]]:
    """The training loss, and the index of the best candidate of every row."""
    gold = torch.tensor([e.labels[0] for e in encodeds])
    sizes = [len(e.sequences) for e in encodeds]
    packed = can_pack(model)
    if task.kind == "classification" and all(e.shares_prompt for e in encodeds):
        scores = [torch.empty(0)] * len(encodeds)
        for rows in batches([len(e.sequences[0]) for e in encodeds], [1] * len(encodeds), batch_size, progress):
            batch = to_device(model, collate([encodeds[i] for i in rows], pad_id, packed=packed))
            for i, row_scores in zip(rows, candidate_scores(model, batch).double().cpu(), strict=True):
                scores[i] = row_scores[: sizes[i]]
    else:
        losses, counts = _option_sums(model, encodeds, pad_id, batch_size, progress)
        scores = (-losses / counts).split(sizes)
    predictions = [int(s.argmax()) for s in scores]
    if task.kind == "classification":
        loss = -torch.stack([s.log_softmax(0)[y] for s, y in zip(scores, gold, strict=True)]).mean()
    else:
        correct = torch.tensor([0, *sizes[:-1]]).cumsum(0) + gold
        loss = losses[correct].sum() / counts[correct].sum()
    return loss, predictions


def _option_sums(
    model: nn.Module, encodeds: list[Encoded], pad_id: int, batch_size: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Summed negative log-probability and number of the option tokens, fp64 on the CPU, one entry per
    candidate of every row, in their order."""
    packed = can_pack(model)
    options = [e.candidate(c) for e in encodeds for c in range(len(e.sequences))]
    groups = []  # of candidates that share a prompt, few enough for a batch
    first = 0
    for e in encodeds:
        end = first + len(e.sequences)
        groups += [range(k, min(k + batch_size, end)) for k in range(first, end, batch_size)]
        first = end
    losses = torch.zeros(len(options), dtype=torch.float64)
    longest = [max(len(options[i][0]) for i in group) for group in groups]
    for some in batches(longest, list(map(len, groups)), batch_size, progress):
        chosen = [groups[k] for k in some]
        batch = collate_options([[options[i] for i in group] for group in chosen], pad_id, packed=packed)
        batch = to_device(model, batch)
        losses[[i for group in chosen for i in group]] = option_losses(model, batch).double().sum(1).cpu()
    counts = [sum(target != IGNORED for target in option) for _, option in options]
    return losses, torch.tensor(counts, dtype=torch.float64)


def to_device(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors where the model's are."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def batches(
    lengths: list[int], sizes: list[int], batch_size: int, progress: bool, padded: bool = True
) -> Iterable[list[int]]:
    """Numbers of items, longest first, in batches of up to batch_size by the sum of their sizes; of one length where
    they are not to be padded."""
    made: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if sizes[i] > room or not (padded or lengths[i] == lengths[made[-1][-1]]):
            made.append([])
            room = batch_size
        made[-1].append(i)
        room -= sizes[i]
    if progress:
        from tqdm.auto import tqdm

        return tqdm(made, desc="evaluate", leave=False, disable=None)  # none where there is no terminal
    return made
