"""Eight architectures beyond those of the other tests: losses are the model's own, probes exact, a step moves all."""

from __future__ import annotations

import pytest
import torch
import transformers
from noted import Noted
from references import ANSWERS, COMMON, GATED, SEVERAL, SINGLE, reference_loss, rounding

from zo_finetuner.encoding import collate, pad_left
from zo_finetuner.engine import Engine
from zo_finetuner.isolation import can_pack
from zo_finetuner.objective import training_loss
from zo_kernels import derive_seed, draw_noise, seed_tensor, tensor_ids

EPS = 1e-2
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
PLAIN = COMMON | {"intermediate_size": 64, "initializer_range": 0.3}
WINDOWS = ["sliding_attention", "full_attention"]
SHORT = {"vocab_size": 97, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {  # what is new in each
    "Qwen3": GATED | {"head_dim": 16} | TIED,  # norms of queries and keys, heads wider than the model
    "Gemma3": GATED | {"head_dim": 8, "sliding_window": 4, "layer_types": WINDOWS} | TIED,  # windows in some layers
    "GPTNeoX": PLAIN | UNTIED,  # one matrix for q, k and v; attention and MLP side by side
    "Phi": PLAIN | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5} | UNTIED,  # a head with a bias
    "Phi3": GATED | UNTIED,  # gate and up in one matrix
    "Falcon": COMMON | {"initializer_range": 0.3} | TIED,  # one head of keys
    "Bloom": SHORT | {"hidden_size": 32, "initializer_range": 0.3} | TIED,  # positions by ALiBi alone
    "Mixtral": GATED | {"num_local_experts": 3, "num_experts_per_tok": 2} | UNTIED,  # experts in one tensor
}
each = pytest.mark.parametrize("name", ARCHITECTURES)


def build(name, dtype=torch.float32):
    torch.manual_seed(1)
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(name, name) + "Config")(**ARCHITECTURES[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def labelled():
    batch = pad_left([e.sequences[0] for e in ANSWERS], 0)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def own_loss(model, batch):
    accepted = {k: v for k, v in batch.items() if k != "position_ids" or "BLOOM" not in type(model).__name__.upper()}
    return model(**accepted).loss.detach()


@each
@torch.no_grad()
def test_losses_are_the_models_own(name):
    model = build(name)
    packed_or_not = (True, False) if can_pack(model) else (False,)
    for packed in packed_or_not:
        for rows in (SINGLE, SEVERAL):
            loss, _ = training_loss(model, collate(rows, 0, packed=packed))
            torch.testing.assert_close(loss, reference_loss(model, rows), rtol=0, atol=rounding(model, rows))
        total = 0.0
        for encoded in ANSWERS:
            ids = torch.tensor([encoded.sequences[0]])
            labels = ids.clone()
            labels[:, : -encoded.option_lengths[0]] = -100
            total += model(input_ids=ids, labels=labels).loss * encoded.option_lengths[0]
        loss, _ = training_loss(model, collate(ANSWERS, 0, packed=packed))
        torch.testing.assert_close(loss, total, rtol=3e-6, atol=0)


@pytest.mark.parametrize("probing", ["inplace", "scratch", "paired"])
@each
def test_probes_are_exact_and_a_step_moves_all(name, probing):
    model, dense, batch = build(name), build(name), labelled()
    theta = {n: p.detach().clone() for n, p in dense.named_parameters()}
    ids, expected = tensor_ids(theta), []
    for sign in (1, -1):
        for n, p in dense.named_parameters():
            z = draw_noise(tuple(p.shape), seed_tensor(derive_seed(4, 0, 0)), ids[n])
            p.data.copy_(theta[n] + sign * EPS * z)
        expected.append(own_loss(dense, batch))
    engine = Engine(model, Noted(), eps=EPS, seed=4, probing=probing)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == ARCHITECTURES[name]["tie_word_embeddings"] and len(engine.blocks) == len(theta)  # one block if tied
    engine.step(lambda: own_loss(model, batch), 1e-3)
    torch.testing.assert_close(engine.method.told[0], torch.stack(expected), rtol=5e-6, atol=0)
    for n, p in model.named_parameters():
        assert not torch.equal(p, theta[n]), n
    engine.step(lambda: own_loss(model, batch), 1e-3)
    assert not getattr(engine.probing, "reason", "")


@each
def test_16_bit_weights_are_what_they_were_after_probes(name):
    model, batch = build(name, torch.bfloat16), labelled()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = Engine(model, Noted(), eps=EPS)
    assert engine.probing.mode == "scratch"
    for _ in range(2):
        engine.step(lambda: own_loss(model, batch), 0.0)
    assert engine.method.told[0][0] != engine.method.told[0][1]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
