"""Losses of a head in slices: those of the whole head, in every probing, and neither of its large tensors made."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from noted import Noted
from references import ANSWERS, GATED, MODELS, SEVERAL, VOCABULARY, make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_finetuner import slices
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.objective import label_logits, option_losses, training_loss
from zo_finetuner.optim import MeZO
from zo_finetuner.rows import output_head
from zo_finetuner.slices import head_slices, slice_rows, slicing

ROWS = 40  # of 97: slices of 40, 40 and 17
SCALED = {
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},  # a head with a bias
}


def model_of(name, attention=None, **changes):
    if name not in SCALED:
        return make(name, attention, **changes)
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**GATED | SCALED[name] | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return model


ALL = [*MODELS, *((name, None) for name in SCALED)]
FEW = ["Llama", "Qwen2", "Gemma2", "OPT", "Cohere", "Granite", "Phi"]  # untied, tied, soft cap, tied, scales, bias


@pytest.fixture
def in_slices(monkeypatch):
    monkeypatch.setattr(slices, "slice_rows", lambda model, head: ROWS)


def whole_losses(model, batch):
    """The full form: logits of all labels over the vocabulary."""
    targets, counted = batch["targets"], batch["counted"]
    logits = label_logits(model, batch).float()
    losses = F.cross_entropy(logits, targets.flatten()[counted], reduction="none")
    return losses.new_zeros(targets.numel()).index_copy(0, counted, losses).view(targets.shape)


def head_calls(model):
    """Shapes of what the head makes from now on, appended to as it is called."""
    shapes = []
    output_head(model).register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    return shapes


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("rows", [SEVERAL, ANSWERS], ids=["several", "answers"])
@pytest.mark.parametrize(("name", "attention"), ALL)
@torch.no_grad()
def test_losses_are_those_of_the_whole_head(in_slices, name, attention, rows, packed):
    model, batch = model_of(name, attention), collate(rows, 0, packed=packed)
    want = whole_losses(model, batch)
    assert not slicing(model).fault
    shapes = head_calls(model)
    got = option_losses(model, batch)
    assert [shape[-1] for shape in shapes] == [40, 40, 17]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_16_bit_logits_are_summed_in_fp32(in_slices, name, dtype):
    """The only error left is of the products, whose order may depend on the number of rows: here it does not."""
    model, batch = model_of(name).to(dtype), collate(ANSWERS, 0, packed=True)
    torch.testing.assert_close(option_losses(model, batch), whole_losses(model, batch), rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_a_head_of_one_slice_is_read_as_ever():
    model, batch = make("Llama"), collate(ANSWERS, 0)
    shapes = head_calls(model)
    got = option_losses(model, batch)
    assert shapes == [(3, 4, VOCABULARY)] and torch.equal(got, whole_losses(model, batch))


@torch.no_grad()
def test_logits_without_a_largest_one():
    """-inf in a whole slice, in all slices before, and everywhere; infinity and NaN stay what they are whole."""
    logits = torch.randn(6, 97)
    logits[0, :40] = logits[1, 40:] = logits[2, 50] = logits[3] = -torch.inf
    logits[4, 3], logits[5, 3] = torch.inf, torch.nan
    targets = torch.tensor([96, 0, 50, 1, 2, 2])
    losses = slices._Losses(targets[:, None])
    for start in (0, 40, 80):
        losses.add(logits[:, None, start : start + 40], start)
    want = F.cross_entropy(logits, targets, reduction="none")
    got = losses.value()[:, 0, 0]
    torch.testing.assert_close(got[:3], want[:3])
    assert got[2] == torch.inf and not got[3:].isfinite().any() and not want[3:].isfinite().any()


# --- probing


def run(model, batch, mode, steps=3, **settings):
    engine = Engine(model, Noted(), probing=mode, eps=1e-2, seed=5, **settings)

    def loss():
        total, weight = training_loss(model, batch)
        return total / weight

    for _ in range(steps):
        engine.step(loss, 1e-3)
    return torch.cat(engine.method.told), engine


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", FEW)
def test_probes_see_the_perturbed_head(request, monkeypatch, name, backend):
    """Of one step, for each probing: losses of slices are those of the whole head with the same noise; + through a
    scratch is + in place, to the bit."""
    if backend == "cpu":
        request.getfixturevalue("cpu")
    monkeypatch.setenv("ZO_BACKEND", backend)
    batch = collate(ANSWERS, 0, packed=True)
    want, _ = run(model_of(name), batch, "scratch", steps=1)
    monkeypatch.setattr(slices, "slice_rows", lambda model, head: ROWS)
    plus = set()
    for mode in ("scratch", "paired", "inplace"):
        got, engine = run(model_of(name), batch, mode, steps=1)
        plus.add(float(got[0]))
        assert not slicing(engine.model).fault
        # In place - is reached by way of +, an ulp or two of a weight aside.
        torch.testing.assert_close(got, want, rtol=1e-5 if mode == "inplace" else 2e-6, atol=0)
    assert len(plus) == 1
    assert (want[0] - want[1]).abs() > 1e-3 * want[0]  # the tolerance is far below what a probe does


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_are_bit_equal_to_two_forwards(in_slices, name, dtype):
    batch = collate(ANSWERS, 0, packed=True)
    alone, one = run(model_of(name, "eager").to(dtype), batch, "scratch")
    paired, other = run(model_of(name, "eager").to(dtype), batch, "paired")
    assert other.probing.reason == "" and other.probing._trusted
    assert torch.equal(alone, paired)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_other_targets_for_minus_are_computed(in_slices, caplog):
    """The inputs of the model are the same, its targets are not."""
    batches = [collate(ANSWERS, 0) for _ in range(2)]
    batches[1]["targets"] = torch.where(batches[1]["targets"] >= 0, 7, -100)

    def losses(mode):
        model, count = make("Llama"), iter(range(100))
        engine = Engine(model, Noted(), probing=mode, eps=1e-2)
        engine.probing._trusted = {"attention_mask:NoneType input_ids:2 position_ids:2 use_cache:bool"}
        engine.step(lambda: training_loss(model, batches[next(count) % 2])[0], 1e-3)
        return engine.method.told[0]

    assert torch.equal(losses("paired"), losses("scratch"))
    assert "other inputs for -" in caplog.text


def test_a_frozen_weight_with_a_trained_bias(in_slices):
    def losses(mode):
        model = model_of("Phi").requires_grad_(False)
        model.lm_head.bias.requires_grad_(True)
        return run(model, collate(ANSWERS, 0), mode, steps=1)[0]

    sliced = losses("scratch")
    assert sliced[0] != sliced[1]
    torch.testing.assert_close(sliced, losses("inplace"), rtol=2e-6, atol=0)


def test_a_lora_adapter_leaves_the_head_sliced(in_slices):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    batch = collate(ANSWERS, 0, packed=True)
    told = {}
    for mode in ("scratch", "paired", "inplace"):
        model = peft.get_peft_model(make("Llama"), config).eval()
        torch.manual_seed(3)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
        if not told:
            torch.testing.assert_close(option_losses(model, batch), whole_losses(model, batch), rtol=2e-6, atol=2e-6)
        slicing(model)
        shapes = head_calls(model)
        told[mode], _ = run(model, batch, mode)
        assert {shape[-1] for shape in shapes} == {40, 17}
    assert torch.equal(told["scratch"], told["paired"])
    torch.testing.assert_close(told["scratch"][:2], told["inplace"][:2], rtol=1e-5, atol=0)


# --- memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator makes, weights and views of them aside."""

    def __init__(self, model):
        super().__init__()
        self.numel, self._own = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self._own:
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("mode", ["scratch", "paired", "inplace", None])
def test_neither_the_heads_copy_nor_all_logits_are_made(monkeypatch, cpu, mode):
    vocabulary, batch = 4999, collate(ANSWERS, 0)
    model = make("Llama", vocab_size=vocabulary)
    head, logits = vocabulary * 32, batch["places"].numel() * vocabulary

    def largest():
        with Largest(model) as made, torch.no_grad():
            total, weight = training_loss(model, batch)
        made_of.append(made.numel)
        return total / weight

    for least, (low, high) in {head: (logits, 4 * head * 2 + 1), 0: (0, min(head, logits) // 2)}.items():
        monkeypatch.setattr(slices, "LEAST", least)
        made_of = []
        slices._KNOWN.clear()
        slicing(model)
        if mode is None:
            largest()
        else:
            engine = Engine(model, MeZO(), probing=mode)
            for _ in range(2):
                engine.step(largest, 1e-6)
        assert low <= max(made_of) < high


@pytest.mark.parametrize(
    ("name", "sizes", "rows"),
    [
        ("Llama", dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192), 8064),  # 16 slices
        ("OPT", dict(vocab_size=50272, hidden_size=7168, ffn_dim=28672, word_embed_proj_dim=7168), 25152),  # two
        ("Llama", dict(vocab_size=32000, hidden_size=256, intermediate_size=704), 16000),  # at least 4 Mi elements
        ("Llama", dict(vocab_size=16384, hidden_size=256, intermediate_size=704), 0),
    ],
)
def test_a_slice_is_no_larger_than_the_largest_other_matrix(name, sizes, rows):
    with torch.device("meta"):
        model = make(name, num_hidden_layers=1, **sizes)
    assert slice_rows(model, output_head(model)) == rows
    assert rows * sizes["hidden_size"] <= max(sizes["hidden_size"] * sizes.get("intermediate_size", 28672), 1 << 22)


@torch.no_grad()
def test_no_wait_for_the_host(in_slices):
    """Meta tensors have no values: any .item(), .tolist(), boolean index or nonzero raises."""
    with torch.device("meta"):
        model = model_of("GPT2", "eager")
    batch = {name: tensor.to("meta") for name, tensor in collate(ANSWERS, 0, packed=True).items()}
    shapes = head_calls(model)
    loss, _ = training_loss(model, batch)
    assert loss.shape == () and [shape[-1] for shape in shapes[-3:]] == [40, 40, 17]


# --- where slices will not do


def assert_whole(model, caplog, *words):
    """The full form, and one line of the log, once."""
    batch = collate(ANSWERS, 0)
    with caplog.at_level(logging.WARNING):
        with torch.no_grad():
            want = whole_losses(model, batch)
            for _ in range(2):
                assert torch.equal(option_losses(model, batch), want)
    lines = [record.getMessage() for record in caplog.records if record.name == "zo_finetuner.slices"]
    assert len(lines) == 1 and "is read whole, not in slices" in lines[0]
    assert type(slices.unwrap(model)).__name__ in lines[0] and "97 x 32" in lines[0]
    for word in words:
        assert word in lines[0]


class Normalised(transformers.LlamaForCausalLM):
    """Logits that depend on one another."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.log_softmax(-1)
        return output


class Padded(transformers.LlamaForCausalLM):
    """Columns that depend on their place."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 90:] = -torch.inf
        return output


class Twice(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0 * self.lm_head(self.model(*args, **kwargs)[0])
        return output


class Short(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        if input_ids.shape[0] == 1:
            raise ValueError("one row is\nnot enough")
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Normalised, "losses that differ by"),
        (Padded, "losses that differ by inf"),
        (Twice, "once each"),
        (Short, "ValueError: one row is"),
    ],
)
def test_a_forward_that_slices_would_change(in_slices, caplog, kind, words):
    torch.manual_seed(1)
    model = kind(make("Llama").config).eval()
    assert_whole(model, caplog, words)


def test_a_head_that_is_not_plain(in_slices, caplog):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    assert_whole(peft.get_peft_model(make("Llama"), config).eval(), caplog, "peft.tuners.lora.layer.Linear")


def test_a_head_whose_weights_accelerate_moves(in_slices, caplog):
    model = make("Llama")
    model.lm_head._hf_hook = object()
    assert_whole(model, caplog, "accelerate")


def test_gradients_take_the_whole_head(in_slices, caplog):
    model, batch = make("Qwen2"), collate(ANSWERS, 0)
    shapes = head_calls(model)
    slicing(model)
    shapes.clear()
    training_loss(model, batch)[0].backward()
    assert shapes == [(3, 4, VOCABULARY)] and model.lm_head.weight.grad.abs().sum() > 0 and not caplog.records


def test_models_without_a_head_are_left_alone(in_slices):
    assert not slicing(nn.Linear(3, 2)).rows and not slicing(transformers.LlamaModel(make("Llama").config)).rows


@torch.no_grad()
def test_autocast_casts_every_slice(in_slices):
    model, batch = make("Llama"), collate(ANSWERS, 0)
    with torch.autocast("cpu", torch.bfloat16):
        want = whole_losses(model, batch)  # and leaves a copy of the head in the context's cache
        got = option_losses(model, batch)
    assert not slicing(model).fault and not torch.equal(want, whole_losses(model, batch))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["scratch", "paired", "inplace"])
def test_the_model_comes_back_after_an_exception(in_slices, mode, error):
    model, batch, calls = make("Qwen2"), collate(ANSWERS, 0), []
    engine = Engine(model, MeZO(), probing=mode)
    storages = [p.data_ptr() for p in model.parameters()]

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise error

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(error):
        engine.step(lambda: training_loss(model, batch)[0], 1e-3)
    hook.remove()
    assert [p.data_ptr() for p in model.parameters()] == storages
    for module in model.modules():
        assert "forward" not in vars(module) and not [name for name in vars(module) if name.startswith("_zo")]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.isfinite(engine.step(lambda: training_loss(model, batch)[0], 1e-3))


@torch.no_grad()
def test_the_verdict_is_kept_with_the_head(in_slices):
    model = make("Qwen2")
    first = slicing(model)
    assert slicing(model) is first and first.rows == ROWS and first.body == (model.model,)
    model.resize_token_embeddings(120)
    assert slicing(model) is not first and slicing(model).shape == (120, 32)
    assert head_slices(model, torch.zeros(1, 1, dtype=torch.int64)).__enter__()
