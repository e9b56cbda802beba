"""Accuracy, F1 and loss of a split against one forward per candidate and token-by-token greedy decoding."""

from __future__ import annotations

import pytest
import torch
from references import ANSWERS, CONFIGS, make, pretrained, read, reference_scores, row
from torch import nn
from transformers import AutoTokenizer

from zo_finetuner import evaluation
from zo_finetuner.encoding import collate, context_length, encode_rows
from zo_finetuner.errors import InputError
from zo_finetuner.evaluation import evaluate_split, generate_answers, newline_tokens
from zo_finetuner.objective import option_losses, training_loss
from zo_finetuner.tasks import f1, get_task


@pytest.mark.parametrize(
    ("name", "count", "model_name"),
    [
        ("sst2", 20, "imdb-llama-6m"),  # one prompt pass
        ("cb", 12, "stories260k-llama"),  # three candidates of several tokens
        ("copa", 20, "stories260k-llama"),
        ("record", 3, "stories260k-llama"),  # any number of candidates, several of them right
    ],
)
@pytest.mark.filterwarnings("ignore:.*exceed 512 tokens")
@torch.no_grad()
def test_evaluate_choices(shared, name, count, model_name):
    model, tokenizer = pretrained(shared, model_name)
    task, rows = get_task(name), read(shared, name, count)
    model.train()
    got = evaluate_split(model, task, rows, tokenizer, batch_size=7)
    assert model.training and got.keys() == {"loss", "accuracy", "n"} and got["n"] == count
    model.eval()
    encodeds = encode_rows(task, rows, tokenizer, max_length=context_length(model))
    hits = sum(int(reference_scores(model, e).argmax()) in e.labels for e in encodeds)
    assert got["accuracy"] == hits / count
    loss, weight = training_loss(model, collate(encodeds, tokenizer.pad_token_id))
    assert got["loss"] == pytest.approx(float(loss / weight), rel=1e-6)

    again = evaluate_split(model, task, encodeds[::-1], tokenizer, batch_size=3)
    assert again["accuracy"] == got["accuracy"] and again["loss"] == pytest.approx(got["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["sst2", "cb", "copa"])
@torch.no_grad()
def test_a_model_that_cannot_pack_gives_the_same_numbers(shared, name, monkeypatch):
    model, tokenizer = pretrained(shared, "stories260k-llama")
    rows = read(shared, name, 12)
    packed = evaluate_split(model, get_task(name), rows, tokenizer, batch_size=5)
    monkeypatch.setattr(evaluation, "can_pack", lambda model: False)
    padded = evaluate_split(model, get_task(name), rows, tokenizer, batch_size=5)
    assert packed["accuracy"] == padded["accuracy"] and packed["loss"] == pytest.approx(padded["loss"], rel=1e-6)


@torch.no_grad()
def test_a_row_with_many_candidates_is_divided(shared, monkeypatch):
    """batch_size bounds the sequences of a forward; those of a row that fit into one share its prompt."""
    model, tokenizer = pretrained(shared, "stories260k-llama")
    common = {"passage": "Some people met. " * 9, "query": "@placeholder won", "answers": ["Bob"]}
    names = (["Ann", "Bob", "Cy", "Dan", "Eve", "Flo", "Guy"], ["Bob", "Ann"])
    rows = [common | {"entities": entities} for entities in names]
    seen = []

    def spy(model, batch):
        seen.append(tuple(batch["targets"].shape)[:1] + tuple(batch["input_ids"].shape))
        return option_losses(model, batch)

    monkeypatch.setattr(evaluation, "option_losses", spy)
    got = evaluate_split(model, get_task("record"), rows, tokenizer, batch_size=4)
    assert sorted(count for count, *_ in seen) == [2, 3, 4]
    encodeds = encode_rows(get_task("record"), rows, tokenizer)
    assert got["accuracy"] == sum(int(reference_scores(model, e).argmax()) in e.labels for e in encodeds) / 2
    prompt = len(encodeds[0].prompt)
    for count, batch_rows, length in seen:
        assert count > 1 and prompt < batch_rows * length < 2 * prompt


def greedy(model, prompt, ends):
    """Token by token without padding, cache or `generate`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + 50 and (len(ids) == len(prompt) or ids[-1] not in ends):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_evaluate_generation(shared):
    model, tokenizer = pretrained(shared, "stories260k-llama")
    task = get_task("squad")
    rows = [row | {"context": row["context"][:40]} for row in read(shared, "squad", 5)]
    newline = newline_tokens(tokenizer)
    assert tokenizer.encode("\n", add_special_tokens=False)[-1] in newline
    encodeds = encode_rows(task, rows, tokenizer, max_length=512)
    model.eval()
    texts = []
    for encoded in encodeds:
        ids = greedy(model, encoded.prompt, newline | {tokenizer.eos_token_id})
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip())
    assert any(texts)
    assert generate_answers(model, encodeds, tokenizer, batch_size=3) == texts
    got = evaluate_split(model, task, rows, tokenizer, batch_size=3)
    assert got["f1"] == sum(f1(t, r["answers"]["text"]) for t, r in zip(texts, rows, strict=True)) / 5
    loss, weight = training_loss(model, collate(encodeds, tokenizer.pad_token_id))
    assert got["loss"] == pytest.approx(float(loss / weight), rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_architecture_answers_in_batches_as_alone(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k-llama")
    room = {"n_positions": 96} if name == "GPT2" else {"max_position_embeddings": 96}
    model = make(name, vocab_size=len(tokenizer), **room)
    prompts = [row("generation", n, [[9]], 0, n) for n in (5, 17, 2)]
    ends = newline_tokens(tokenizer) | {tokenizer.eos_token_id}
    texts = [tokenizer.decode(greedy(model, p.prompt, ends), skip_special_tokens=True) for p in prompts]
    assert generate_answers(model, prompts, tokenizer, batch_size=3) == [t.split("\n")[0].strip() for t in texts]


class Speaker(nn.Module):
    """Says the same words to every prompt, then pads."""

    def __init__(self, ids):
        super().__init__()
        self.ids, self.nothing = torch.tensor([ids]), nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, eos_token_id, **_):
        self.ends = eos_token_id
        return torch.cat([input_ids, self.ids.expand(len(input_ids), -1)], 1)


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        ([" the Jets", "\n", " and"], "the Jets"),
        ([" the Jets", "</s>", " and"], "the Jets"),
        (["\n", " the Jets"], ""),
        ([" the Jets "], "the Jets"),
    ],
)
def test_answers_end_at_newline_or_eos(shared, spoken, expected):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "imdb-llama-6m")
    ids = [i for text in spoken for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    speaker = Speaker(ids)
    assert generate_answers(speaker, ANSWERS, tokenizer, batch_size=2) == [expected] * 3
    assert tokenizer.eos_token_id in speaker.ends


def test_an_empty_split_is_an_error():
    with pytest.raises(InputError, match='task "copa": nothing to evaluate'):
        evaluate_split(make("Llama"), get_task("copa"), [], None)
