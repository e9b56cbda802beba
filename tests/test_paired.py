"""Both signs in one forward: the losses, copies and weights of two forwards, from half the passes."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, tiny, tokens
from noted import Noted
from references import ANSWERS, CONFIGS, SEVERAL, SINGLE, make
from test_hf import losses, weights
from test_hf import run as train
from torch import nn

import zo_finetuner.scratch as scratch_module
from zo_finetuner.encoding import collate, pad_left
from zo_finetuner.engine import Engine
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import MeZO

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS, LR, STEPS = 1e-2, 1e-3, 3  # of three steps the first takes two forwards


def run(mode, model, loss_fn, steps=STEPS, eps=EPS, seed=0):
    """(losses of all probes, the engine) of some steps."""
    engine = Engine(model, Noted(), probing=mode, eps=eps, seed=seed)
    for _ in range(steps):
        engine.step(lambda: loss_fn(model), LR)
    return torch.cat(engine.method.told), engine


def assert_paired_equals_scratch(build, loss_fn, ulps=0):
    """Losses and weights to the bit: a half goes through every operator in the shape it has alone, or through one that
    treats rows alike however many there are.  Where one does not: to some ulp of a loss between 4 and 8."""
    (alone, one), (paired, other) = (run(mode, build(), loss_fn) for mode in ("scratch", "paired"))
    assert other.probing.reason == "" and other.probing._trusted
    if ulps:
        assert 4 < alone.min() and alone.max() < 8
        assert (alone[2:4] - paired[2:4]).abs().max() <= ulps * 2**-21  # later weights carry the difference on
        return
    assert torch.equal(alone, paired)
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def own_loss(batch):
    """The model's own loss of labelled tokens, as the Trainer asks for it."""
    return lambda model: model(**batch).loss.detach()


def padded_batch():
    batch = pad_left([e.sequences[0] for e in ANSWERS], 0)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_two_forwards(name, dtype):
    assert_paired_equals_scratch(lambda: make(name).to(dtype), own_loss(padded_batch()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 2, 11])
@pytest.mark.parametrize("name", ["GPT2", "OPT", "Llama"])  # GPT-2 looks up positions of (1, T)
def test_a_batch_of_one_row_and_one_as_long_as_wide(name, rows, attention):
    """Eager attention multiplies the matrices of a batch at once: by another routine when there is one head's alone, or
    fewer than it takes to share them out."""
    ids, ulps = tokens(rows, 11), 4 if attention == "eager" else 0
    assert_paired_equals_scratch(lambda: make(name, attention), own_loss({"input_ids": ids, "labels": ids}), ulps)


def test_position_ids_may_be_one_row_for_all():
    ids = tokens(3, 9)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(9)[None]}
    for name in ("GPT2", "Qwen2"):
        assert_paired_equals_scratch(lambda n=name: make(n), own_loss(batch))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("rows", [SINGLE, SEVERAL, ANSWERS], ids=["single", "several", "answers"])
@pytest.mark.parametrize("name", ["Llama", "OPT", "GPT2", "Gemma2", "Qwen2"])
def test_every_objective(name, rows, packed):
    """Candidates' head rows, options of several tokens, generated answers."""
    batch = collate(rows, 0, packed=packed)

    def loss(model):
        total, weight = training_loss(model, batch)
        return total / weight

    assert_paired_equals_scratch(lambda: make(name, "eager"), loss)


def test_a_window_of_micro_batches_is_a_queue_of_calls():
    window = [tokens(2, 7, seed=1), tokens(3, 5, seed=2), tokens(2, 7, seed=3)]
    loss = lambda model: torch.stack([model(input_ids=ids, labels=ids).loss for ids in window]).mean()  # noqa: E731
    assert_paired_equals_scratch(lambda: tiny("llama-tied", torch.bfloat16), loss)


def test_inputs_made_anew_for_each_closure_are_recognised():
    def loss(model):
        ids = tokens(2, 8)
        return model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss

    assert_paired_equals_scratch(lambda: tiny("llama"), loss)


def test_outputs_other_than_losses():
    def loss(model):
        states = model(tokens(), output_hidden_states=True, return_dict=False)[-1]
        return torch.stack(states).float().square().mean()

    assert_paired_equals_scratch(lambda: tiny("opt"), loss)


def test_the_objective_may_run_under_inference_mode():
    def loss(model):
        with torch.inference_mode():
            ids = tokens(2, 8)
            return model(input_ids=ids, labels=ids).loss.clone()

    assert_paired_equals_scratch(lambda: tiny("llama", torch.bfloat16), loss)


def test_a_module_that_calls_its_children():
    """It is run on each half, and its children with it, whoever owns the weights."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))
            self.inner = nn.Linear(8, 8)

        def forward(self, x, *, bias):
            return self.inner(x @ self.weight) @ self.weight + bias, None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.block, self.out = nn.Embedding(9, 8), Block(), nn.Linear(8, 3)

        def forward(self, ids):
            return self.out(self.block(self.embed(ids), bias=torch.ones(1, 1, 8))[0])

    ids = torch.arange(8).view(2, 4)
    assert_paired_equals_scratch(Model, lambda model: model(ids).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trainer_with_accumulated_windows(tmp_path, dtype):
    ends = []
    for mode in ("scratch", "paired"):
        trainer = train(tmp_path / mode, dtype, {"eps": 1e-2, "probing": mode}, batch=2, accumulate=2, steps=4)
        assert mode == "scratch" or trainer.zo_optimizer.engine.probing._trusted
        ends.append((losses(trainer), weights(trainer)))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])


def test_lora_reads_its_frozen_base_once():
    """The frozen products of a doubled batch may sum in another order: a few ulp of a loss near 4.6 (4.8e-7)."""
    peft = pytest.importorskip("peft")

    def build():
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(tiny("llama"), adapter)

    ids, seen = tokens(4, 11), []
    loss = own_loss({"input_ids": ids, "labels": ids})
    alone, _ = run("scratch", build(), loss)
    model = build()
    base = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    base.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    paired, engine = run("paired", model, loss)
    assert engine.probing.reason == ""
    assert (alone - paired).abs().max() <= 4 * 2**-21
    assert seen[-2:] == [8, 8]  # a step's only pass over the frozen weights, with both batches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_copies_are_those_of_scratch_probing(dtype, monkeypatch):
    """Every perturbed weight to the bit, and one pass over theta where there were two."""
    ids, real, copies = tokens(2, 8), scratch_module.scratch, {}

    def noted(theta, out, tensor_id, *args, mirror=None, rows=None, **kwargs):
        real(theta, out, tensor_id, *args, mirror=mirror, rows=rows, **kwargs)
        passes.append(tensor_id)
        first = out if rows is None or mirror is None else out[: len(rows) // 2]
        second = mirror if rows is None or mirror is None else mirror[len(rows) // 2 :]
        made.setdefault(tensor_id, []).extend(copy.clone() for copy in (first, second) if copy is not None)

    monkeypatch.setattr(scratch_module, "scratch", noted)
    counts = {}
    for mode in ("scratch", "paired"):
        model = tiny("gemma2", dtype)
        engine = Engine(model, MeZO(), eps=1e-4, probing=mode)
        for _ in range(2):
            made, passes = {}, []
            engine.step(own_loss({"input_ids": ids, "labels": ids}).__get__(model), 0.0)
        copies[mode], counts[mode] = made, len(passes)
    assert copies["scratch"].keys() == copies["paired"].keys()
    for tensor_id, scratches in copies["scratch"].items():
        # a tied embedding is made for its rows and for the head: by + and by -, or by one pass each
        pairs = copies["paired"][tensor_id]
        by_shape = lambda copy: (tuple(copy.shape), copy.float().sum().item())  # noqa: E731
        for ours, theirs in zip(sorted(pairs, key=by_shape), sorted(scratches, key=by_shape), strict=True):
            assert torch.equal(ours, theirs)
    assert counts["scratch"] == 2 * counts["paired"]


def test_two_copies_of_the_largest_module_and_no_more():
    model, ids = tiny("llama"), tokens()
    _, engine = run("paired", model, own_loss({"input_ids": ids, "labels": ids}))
    held = sum(b.numel() for stack in engine.probing._stacks.values() for b in stack._buffers)
    assert held == 2 * max(p.numel() * 4 for p in model.parameters())


def test_a_pair_is_one_forward():
    model, ids, calls = tiny("llama", torch.bfloat16), tokens(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model, MeZO(), eps=EPS, probing="paired")
    counts = []
    for _ in range(3):
        engine.step(lambda: model(input_ids=ids, labels=ids).loss, LR)
        counts.append(len(calls))
        calls.clear()
    assert counts == [2 + 2, 1, 1]  # the rehearsal takes a doubled forward for each sign


def test_an_embedding_of_fewer_rows_than_tokens_is_copied_whole():
    ids = tokens(VOCAB, 2)
    assert_paired_equals_scratch(lambda: tiny("llama", torch.bfloat16), own_loss({"input_ids": ids, "labels": ids}))
