"""LoRA, DoRA, prefix and prompt: probes are the dense model's, packed losses the model's own, files PEFT's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from models import save_model, save_rows, tiny, tokens
from noted import Noted
from references import ANSWERS, GATED, MODELS, SEVERAL, SINGLE, make, reference_loss
from test_hf import Rows, arguments

from zo_finetuner import slices
from zo_finetuner.adapters import (
    ADAPTERS,
    RATES,
    Adapter,
    _real_tokens,
    adapter_base,
    adapter_kind,
    add_adapter,
    load_adapter,
)
from zo_finetuner.cli import main
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.evaluation import generate_answers
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import training_loss
from zo_finetuner.optimizer import create_zo_optimizer
from zo_finetuner.params import trainable_blocks
from zo_finetuner.slices import slicing
from zo_kernels import derive_seed, draw_noise, seed_tensor, tensor_ids

peft = pytest.importorskip("peft")
EPS = 1e-2
VIRTUAL = ("prefix", "prompt")
IDS = tokens()


def adapted(kind, model=None, count=3):
    """Adapters that matter: B of LoRA is not zero, virtual tokens are not any that the vocabulary has."""
    model = tiny("llama") if model is None else model
    torch.manual_seed(0)
    model = add_adapter(model, Adapter(kind, tokens=count) if kind in VIRTUAL else Adapter(kind, rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


def require_peft_of_gemma2():
    if peft.__version__.startswith("0.18."):
        with pytest.raises(InputError, match="does not read it as it reads tokens"):
            add_adapter(make("Gemma2", "eager"), Adapter("prefix", tokens=3))
        pytest.skip("PEFT 0.18 with transformers 5.0 puts a prefix of Gemma 2 in the wrong place; it is refused")


def own_loss(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss.detach()


def moved(model, seed, by):
    """A copy at theta + by * z, z materialised; LoRA and DoRA merged into a model without PEFT."""
    model = copy.deepcopy(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor_id in tensor_ids(trained).items():
        trained[name].data += by * draw_noise(tuple(trained[name].shape), seed_tensor(seed), tensor_id)
    return model.merge_and_unload() if adapter_kind(model) in ("lora", "dora") else model


@pytest.mark.parametrize("probing", ["inplace", "scratch", "paired"])
@pytest.mark.parametrize("base", ["llama-tied", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_both_signs_are_the_dense_models_and_the_base_stays(kind, base, probing):
    model = adapted(kind, tiny(base))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = [own_loss(moved(model, derive_seed(5, 0, 0), sign * EPS)) for sign in (1, -1)]
    engine = Engine(model, Noted(), eps=EPS, seed=5, probing=probing)
    engine.step(lambda: own_loss(model), 1e-2)
    torch.testing.assert_close(engine.method.told[0], torch.stack(expected), rtol=2e-6, atol=0)
    assert expected[0] != expected[1]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    engine.step(lambda: own_loss(model), 1e-2)
    assert not getattr(engine.probing, "reason", "")  # pairs are one forward, from the second step on
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_saved_in_pefts_format_and_loaded_it_answers_the_same(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    loaded = load_adapter(tiny("llama"), str(tmp_path)).eval()
    assert adapter_kind(loaded) == kind
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    names = [set(trainable_blocks(m).names) for m in (loaded, model)]
    assert names[0] == names[1]  # so that it has the same noise, and can be trained on


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize(("name", "attention"), MODELS)
@torch.no_grad()
def test_packed_and_padded_losses_are_those_of_one_sequence_at_a_time(name, attention, kind):
    """Virtual tokens before rows that sequences share: each sees them, and stands behind them."""
    if (name, kind) == ("Gemma2", "prefix"):
        require_peft_of_gemma2()
    model = adapted(kind, make(name, attention))
    assert can_pack(model)
    for packed in (True, False):
        for rows in (SINGLE, SEVERAL):
            expected = reference_loss(model, rows)
            torch.testing.assert_close(training_loss(model, collate(rows, 0, packed=packed))[0], expected, rtol=2e-6,
                                       atol=1e-6)
        total = 0.0
        for encoded in ANSWERS:
            ids = torch.tensor([encoded.sequences[0]])
            labels = ids.clone()
            labels[:, : -encoded.option_lengths[0]] = -100
            total += model(input_ids=ids, labels=labels).loss * encoded.option_lengths[0]
        torch.testing.assert_close(training_loss(model, collate(ANSWERS, 0, packed=packed))[0], total, rtol=2e-6,
                                   atol=0)


@pytest.mark.parametrize("probing", ["inplace", "scratch", "paired"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_probes_of_packed_rows(kind, probing):
    model, batch = adapted(kind, make("Qwen2")), collate(SEVERAL, 0, packed=True)

    def loss(m):
        total, weight = training_loss(m, batch)
        return total / weight

    with torch.no_grad():
        expected = [loss(moved(model, derive_seed(0, 1, 0), sign * EPS)) for sign in (1, -1)]
    engine = Engine(model, Noted(), eps=EPS, probing=probing)
    for _ in range(2):
        engine.step(lambda: loss(model), 1e-20)
    torch.testing.assert_close(engine.method.told[1], torch.stack(expected), rtol=2e-6, atol=0)
    assert not getattr(engine.probing, "reason", "")


@torch.no_grad()
def test_a_prefix_longer_than_a_layers_window_is_padded_and_told(caplog):
    require_peft_of_gemma2()
    model = adapted("prefix", make("Gemma2", "eager"), count=3)
    assert can_pack(model)
    base, virtual = make("Gemma2", "eager"), 6  # a window of 4
    with pytest.raises(InputError, match="shorter than 6 tokens"):
        add_adapter(base, Adapter("prefix", tokens=virtual))
    config = peft.PrefixTuningConfig(num_virtual_tokens=virtual, task_type="CAUSAL_LM")
    longer = peft.get_peft_model(base, config).eval()
    assert not can_pack(longer) and "batches are padded, not packed" in caplog.text
    expected = reference_loss(longer, SEVERAL)
    torch.testing.assert_close(training_loss(longer, collate(SEVERAL, 0))[0], expected, rtol=2e-6, atol=1e-6)
    assert can_pack(base) and can_pack(model)  # what one finds out is not taken for another's


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {  # heads of keys: grouped, one for all, as many as queries
    "Qwen3": (GATED | {"head_dim": 16}, 2),
    "Falcon": (SMALL, 1),
    "Bloom": ({"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 4),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_prefix_starts_as_real_tokens(name):
    settings, heads = HEADS[name]
    torch.manual_seed(1)
    base = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()
    model = add_adapter(base, Adapter("prefix", tokens=4), seed=3)
    assert model.active_peft_config.num_attention_heads == heads
    context = _real_tokens(base, 4, 3)
    real = base(torch.cat((context.expand(2, -1), IDS), 1)).logits[:, 4:]
    torch.testing.assert_close(model(IDS).logits, real, rtol=1e-4, atol=1e-5)
    assert (base(IDS).logits - real).abs().max() > 1e-3


@pytest.mark.parametrize("kind", VIRTUAL)
@torch.no_grad()
def test_a_head_in_slices(kind, monkeypatch):
    monkeypatch.setattr(slices, "slice_rows", lambda model, head: 40)
    model, batch = adapted(kind, make("Llama")), collate(ANSWERS, 0, packed=True)
    assert slicing(model).rows == 40
    in_slices, _ = training_loss(model, batch)
    monkeypatch.setattr(slices, "slice_rows", lambda model, head: 0)
    slices._KNOWN.clear()
    torch.testing.assert_close(in_slices, training_loss(model, batch)[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@torch.no_grad()
def test_generated_text_does_not_depend_on_the_batch(kind, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_model(tmp_path))
    model = adapted(kind, make("Llama", vocab_size=len(tokenizer)))
    rows = [copy.copy(e) for e in ANSWERS]
    for row in rows:
        object.__setattr__(row, "prompt", tuple(t % len(tokenizer) for t in row.prompt))
    got = generate_answers(model, rows, tokenizer, batch_size=3)
    for row, text in zip(rows, got, strict=True):
        ids = torch.tensor([row.prompt])
        for _ in range(20):
            token = model(ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat((ids, token[None, None]), 1)
        greedy = tokenizer.decode(ids[0, len(row.prompt) :], skip_special_tokens=True).strip()
        assert text.startswith(greedy) and greedy


def test_rates_are_the_modes_own():
    assert [(r.lr, r.eps) for r in RATES.values()] == [(1e-4, 1e-2), (1e-4, 1e-2), (1e-2, 1e-1), (1e-3, 1e-2)]
    for kind, rates in RATES.items():
        optimizer = create_zo_optimizer(adapted(kind))
        assert (optimizer.param_groups[0]["lr"], optimizer.engine.eps.item()) == pytest.approx((rates.lr, rates.eps))
    normalised = create_zo_optimizer(adapted("prefix"), "fzoo")
    assert (normalised.param_groups[0]["lr"], normalised.engine.eps.item()) == pytest.approx((5e-5, 1e-4))
    given = create_zo_optimizer(adapted("lora"), lr=1e-5, eps=1e-3)
    assert (given.param_groups[0]["lr"], given.engine.eps.item()) == pytest.approx((1e-5, 1e-3))


@pytest.mark.parametrize("method", ["lozo", "subzero", "zo-adam", "ldsd-sgd", "self-calibrated", "forward-grad"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_methods(kind, method):
    model = adapted(kind)
    optimizer = create_zo_optimizer(model, method, lr=1e-3, settings={"rank": 2} if method == "subzero" else {})
    losses = [float(optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss)) for _ in range(2)]
    optimizer.engine.flush()
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert optimizer.engine.metrics()["skipped_steps"] == 0


# --- bad input


def test_an_adapter_that_covers_nothing():
    with pytest.raises(InputError, match="the adapter covers no floating tensor"):
        trainable_blocks(adapted("lora").requires_grad_(False))
    with pytest.raises(InputError, match="adapter lora: Target modules .*nowhere.* not found"):
        add_adapter(tiny("llama"), Adapter("lora", targets="nowhere"))


def test_a_torchao_that_peft_does_not_know_is_told(monkeypatch):
    def of_another_age(*_):
        raise ImportError("cannot import name 'LinearActivationQuantizedTensor' from 'torchao.quantization'")

    monkeypatch.setattr(peft, "get_peft_model", of_another_age)
    with pytest.raises(InputError, match="adapter lora: cannot import name 'LinearActivationQuantizedTensor'"):
        add_adapter(tiny("llama"), Adapter("lora"))


def test_a_prefix_where_none_can_be():
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL))
    with pytest.raises(InputError, match="MambaForCausalLM has layers without keys and values"):
        add_adapter(mamba, Adapter("prefix"))
    with pytest.raises(InputError, match="--lora-targets q_proj,v_proj or all-linear"):
        add_adapter(mamba, Adapter("lora"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lorra"}, 'unknown adapter "lorra" (did you mean "lora"?)'),
        ({"kind": "prefix", "rank": 4}, "lora_rank goes with the adapters lora and dora"),
        ({"kind": "dora", "tokens": 4}, "virtual_tokens goes with the adapters prefix and prompt"),
        ({"kind": "lora", "rank": -1}, "rank of the adapter must not be negative"),
    ],
)
def test_adapters_that_cannot_be(settings, message):
    with pytest.raises(InputError) as error:
        Adapter(**settings)
    assert message in str(error.value)


def test_saved_adapters_that_cannot_be_loaded(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text("{}")
    with pytest.raises(InputError, match="names no base_model_name_or_path"):
        adapter_base(str(tmp_path))
    config.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(InputError, match="an adapter too"):
        adapter_base(str(tmp_path))
    with pytest.raises(InputError, match="no such file; save the adapter"):
        load_adapter(tiny("llama"), str(tmp_path))
    adapted("lora").save_pretrained(tmp_path)
    wider = make("Llama", hidden_size=64)
    with pytest.raises(InputError, match="the adapter does not go onto its base"):
        load_adapter(wider, str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        load_adapter(tiny("llama"), str(tmp_path))


# --- the command line


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    save_rows(folder / "sst2")
    return folder


def train(base, out, *flags):
    return main(["train", "--model", str(base / "model"), "--task", "sst2", "--data", str(base / "sst2"), "--num-train",
                 "20", "--num-dev", "8", "--num-eval", "16", "--output-dir", str(out), "--steps", "4", *flags])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_zo_train_and_zo_eval_of_its_adapter(base, tmp_path, kind, capsys):
    assert train(base, tmp_path / "out", "--adapter", kind) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["config"]["lr"], result["config"]["eps"]) == (RATES[kind].lr, RATES[kind].eps)
    assert (tmp_path / "out" / "model" / "adapter_config.json").is_file()
    capsys.readouterr()
    assert main(["eval", "--model", str(tmp_path / "out" / "model"), "--task", "sst2", "--data", str(base / "sst2"),
                 "--num-eval", "16"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["loss"] == pytest.approx(result["eval_loss_after"], rel=1e-6)


@pytest.mark.parametrize("kind", ["dora", "prompt"])
def test_zo_replay_makes_the_adapter_again(base, tmp_path, kind):
    assert train(base, tmp_path / "out", "--adapter", kind, "--no-checkpoints") == 0
    replayed, journal = tmp_path / "replayed", tmp_path / "out" / "journal.zoj"
    assert main(["replay", str(base / "model"), str(journal), "--out", str(replayed)]) == 0
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "out" / "model", replayed)]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_is_resumed_bit_equal(tmp_path, kind):
    def run(folder, steps, resume=None):
        settings = arguments(folder, steps=6, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
        trainer = ZOTrainer(
            model=adapted(kind), args=settings, train_dataset=Rows(), zo={"probing": "scratch"}, callbacks=[Stop(steps)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    class Stop(transformers.TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step >= self.step

    whole, part = run(tmp_path / "whole", 6), run(tmp_path / "part", 3)
    resumed = run(tmp_path / "part", 6, resume=str(tmp_path / "part" / "checkpoint-3"))
    assert torch.equal(whole, resumed) and not torch.equal(whole, part)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "prefx"], 'unknown adapter "prefx" (did you mean "prefix"?)'),
        (["--virtual-tokens", "3"], "virtual_tokens is given, but no adapter"),
        (["--quantize", "int8"], "quantize is given, but no adapter"),
        (["--adapter", "lora", "--quantize", "int9"], 'unknown quantize "int9" (did you mean "int8"?)'),
        (["--adapter", "lora", "--lora-targets", "nothing"], "adapter lora: Target modules"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(base, tmp_path, capsys, flags, message):
    assert train(base, tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("zo: error: ") and message in told
    assert not (tmp_path / "out").exists()
