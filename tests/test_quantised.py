"""A base in int8 under floating adapters: only read, probed exactly, and refused where nothing floating is chosen."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import save_model, save_rows, tiny, tokens
from noted import Noted
from references import ANSWERS, SINGLE, make, reference_loss
from test_adapters import EPS, adapted, own_loss, train
from test_plan import CONFIGS, allocations, peak_bytes
from transformers import AutoModelForCausalLM

from zo_finetuner.adapters import ADAPTERS, Adapter, add_adapter
from zo_finetuner.cli import main
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.loading import load_model
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.plan import make_plan, planned_rows
from zo_finetuner.quantised import form, parts, quantisation, quantised_tensor
from zo_kernels import derive_seed, draw_noise, seed_tensor, tensor_ids

torchao = pytest.importorskip("torchao.quantization")


def int8(model):
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("probing", ["inplace", "scratch", "paired"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_probes_of_an_adapter_on_int8(kind, probing):
    model = adapted(kind, int8(tiny("llama")))
    name, quantised = quantised_tensor(model)
    assert quantised in ("Int8Tensor", "AffineQuantizedTensor")  # torchao 0.18, and 0.14
    before = {n: (p.dequantize() if form(p) else p).detach().clone() for n, p in model.named_parameters()}

    expected = []
    for sign in (1, -1):
        dense = copy.deepcopy(model)
        trained = {n: p for n, p in dense.named_parameters() if p.requires_grad}
        for n, tensor_id in tensor_ids(trained).items():
            z = draw_noise(tuple(trained[n].shape), seed_tensor(derive_seed(2, 0, 0)), tensor_id)
            trained[n].data += sign * EPS * z
        expected.append(own_loss(dense))

    engine = Engine(model, Noted(), eps=EPS, seed=2, probing=probing)
    for _ in range(2):
        engine.step(lambda: own_loss(model), 1e-2)
    torch.testing.assert_close(engine.method.told[0], torch.stack(expected), rtol=2e-6, atol=0)
    assert not getattr(engine.probing, "reason", "")
    for n, p in model.named_parameters():
        assert torch.equal(p.dequantize() if form(p) else p, before[n]) != p.requires_grad, n


@torch.no_grad()
def test_an_int8_head_is_read_whole():
    model = adapted("lora", int8(make("Llama")))
    assert form(model.get_base_model().lm_head.weight) == "Int8Tensor"
    for packed in (True, False):
        expected = reference_loss(model, SINGLE)
        loss, _ = training_loss(model, collate(SINGLE, 0, packed=packed))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    training_loss(model, collate(ANSWERS, 0))


def test_an_int8_base_without_a_floating_adapter_is_refused():
    with pytest.raises(InputError, match=r"q_proj.weight is Int8Tensor: .* train an adapter on it \(--adapter lora"):
        trainable_blocks(int8(tiny("llama")))
    with pytest.raises(InputError, match="the adapter covers no floating tensor"):
        trainable_blocks(adapted("lora", int8(tiny("llama"))).requires_grad_(False))
    chosen = int8(tiny("llama"))
    for name, p in chosen.named_parameters():
        p.requires_grad_("norm" in name)
    assert len(trainable_blocks(chosen)) == 5  # who chose norms on an int8 base trains them


def test_loading_quantises_the_layers_and_not_the_head(tmp_path):
    model, _ = load_model(str(save_model(tmp_path)), quantize="int8", adapter=Adapter("lora"))
    forms = {n.rpartition("layers.")[2]: form(p) for n, p in model.named_parameters()}
    assert forms["0.self_attn.q_proj.base_layer.weight"] == forms["1.mlp.up_proj.weight"] == "Int8Tensor"
    assert form(model.get_base_model().lm_head.weight) == ""
    ids = tokens() % 18
    assert torch.isfinite(own_loss(model, ids))


@pytest.mark.parametrize("name", ["int9", "nf4", "bnb-int8"])
def test_what_is_missing_is_told(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="unknown quantisation" if name == "int9" else "is not installed|needs a GPU"):
        quantisation(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs a GPU")
@pytest.mark.parametrize("name", ["nf4", "bnb-int8"])
def test_bitsandbytes_on_a_gpu(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(str(save_model(tmp_path)), quantize=name, adapter=Adapter("lora"))
    assert quantised_tensor(model)[1] in ("uint8", "int8")
    ids = (tokens() % 18).to(model.device)
    for probing in ("inplace", "scratch", "paired"):
        engine = Engine(model, Noted(), eps=EPS, probing=probing)
        for _ in range(2):
            engine.step(lambda: own_loss(model, ids), 1e-4)
        assert torch.isfinite(torch.cat(engine.method.told)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_int8_base_takes_the_predicted_memory(cpu, name, dtype, tmp_path):
    """What is loaded to the byte; a step's activations but for small numbers; what first order keeps, which is a copy
    of every layer's weight from the first adapter on, but for less than a layer's input."""
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    plan = make_plan(str(tmp_path), batch=8, seq=64, dtype=dtype, adapter=Adapter("lora"), quantize="int8")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=quantisation("int8"))
    model, batch = add_adapter(base.eval(), Adapter("lora")), collate(planned_rows("sst2", 8, 64), 0, packed=True)
    kept = [part for p in model.parameters() for part in parts(p)] + [*model.buffers(), *batch.values()]
    assert plan.memory.weights == sum(tensor.nbytes for tensor in kept)
    sixteen = make_plan(str(tmp_path), batch=8, seq=64, dtype=dtype, adapter=Adapter("lora"))
    assert plan.memory.weights < sixteen.memory.weights and plan.work.flops == sixteen.work.flops

    def loss():
        total, weight = training_loss(model, batch)
        return total / weight

    engine = Engine(model, make_method("mezo", model), eps=EPS)
    assert engine.probing.mode == plan.probing
    engine.step(loss, 1e-6)
    measured = peak_bytes(lambda: engine.step(loss, 1e-6))
    small = 800 + 16 * len(engine.blocks)
    packed = 2 * 2 * 8 * 64 * 256 if (name, dtype) == ("opt", "bfloat16") else 0  # keys, values: inside CPU attention
    assert 0 <= measured - max(plan.memory.activations, plan.memory.logits) <= small + packed
    _, sizes = allocations(loss)
    assert 0 <= sum(sizes) - plan.memory.kept < 8 * 64 * 256 * plan.dtype.itemsize


@pytest.mark.parametrize(("kind", "a_weight", "a_row"), [("int8", 1, 5), ("nf4", 0.5 + (1 + 4 / 256) / 64, 0),
                                                         ("bnb-int8", 1, 4)])  # fmt: skip
def test_layers_in_few_bits_are_planned_by_their_layout(kind, a_weight, a_row, tmp_path):
    """Of any kind, without its package or a GPU; embeddings, norms and head stay as they are."""
    config = CONFIGS["llama"]
    config.save_pretrained(tmp_path)
    plain, packed = (make_plan(str(tmp_path), batch=2, seq=16, dtype="bfloat16", adapter=Adapter("lora"), quantize=q)
                     for q in (None, kind))  # fmt: skip
    h, f, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    layers = config.num_hidden_layers
    weights, rows = layers * (2 * h * h + 2 * h * kv + 3 * h * f), layers * (3 * h + 2 * kv + 2 * f)
    saved = plain.memory.weights - packed.memory.weights
    tables = layers * 7 * (4 * (256 + 16 + 1) + 4)  # of nf4, and what the last scale of scales lacks
    expected = (2 - a_weight) * weights - a_row * rows
    assert 0 <= expected - saved <= (tables if kind == "nf4" else 0)
    assert packed.memory.peak < plain.memory.peak and packed.quantize == kind


def test_zo_plan_of_a_quantised_base(tmp_path, capsys):
    CONFIGS["llama"].save_pretrained(tmp_path)
    argv = ["plan", "--model", str(tmp_path), "--seq", "16", "--device", "H100"]
    assert main([*argv, "--adapter", "lora", "--quantize", "nf4"]) == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM in nf4 with lora" in text and "bitsandbytes' layout as it is documented" in text
    for more in ([], ["--adapter", "dora"]):
        assert main([*argv, "--quantize", "int8", *more]) == 2
        assert "a quantised base is planned under lora" in capsys.readouterr().err
    with pytest.raises(InputError, match='unknown quantize "int9" .did you mean "int8"'):
        make_plan(str(tmp_path), seq=16, adapter=Adapter("lora"), quantize="int9")


def test_zo_train_and_zo_eval_on_an_int8_base(tmp_path, capsys):
    save_model(tmp_path / "model")
    save_rows(tmp_path / "sst2")
    assert train(tmp_path, tmp_path / "out", "--adapter", "prefix", "--quantize", "int8") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    capsys.readouterr()
    assert main(["eval", "--model", str(tmp_path / "out" / "model"), "--task", "sst2", "--data", str(tmp_path / "sst2"),
                 "--num-eval", "16", "--quantize", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["eval_loss_after"], rel=1e-5)
    assert "quantised (Int8Tensor)" in (tmp_path / "out" / "model" / "README.md").read_text()
