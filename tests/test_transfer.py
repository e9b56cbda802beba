"""The artefact of a base on its derivative, and, when asked for, on another depth and width of its family."""

from __future__ import annotations

import logging

import pytest
import torch
from models import tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from zo_finetuner.cards import RECIPES, Card, fingerprint
from zo_finetuner.config import RunConfig
from zo_finetuner.errors import InputError
from zo_finetuner.optim import make_method
from zo_finetuner.optim.transfer import nearest_blocks, transferred
from zo_finetuner.optimizer import create_zo_optimizer
from zo_finetuner.params import trainable_blocks
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import save_pertnn
from zo_finetuner.scale_net import ScaleNet, static_inputs


def llama(layers: int, hidden: int, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )).eval()  # fmt: skip


def artefact(kind: str, base, folder):
    """Networks of that kind for the base, other in every block, in a file."""
    blocks = trainable_blocks(base)
    sigma = torch.linspace(0.5, 2.0, len(blocks))
    if kind == "paper":
        nets = PertNN.fresh(blocks.names, seed=3)
    else:
        nets = ScaleNet.fixed(blocks.names, blocks.numels, sigma, source="")
        if kind == "improved":
            nets = ScaleNet.fresh(blocks.names, blocks.numels)
            with torch.no_grad():
                nets.log_base.copy_(sigma.log())
                nets.w2.fill_(0.1)
    card = Card(source="zo learn", base_model="the base", base_fingerprint=fingerprint(base), recipe=kind,
                inputs=RECIPES[kind])
    save_pertnn(folder / f"{kind}.safetensors", nets, card)
    return nets, folder / f"{kind}.safetensors"


def step(model, method: str, **settings) -> torch.Tensor:
    ids = tokens()
    optimizer = create_zo_optimizer(model, method, lr=1e-4, **settings)
    return optimizer.step(lambda: model(input_ids=ids, labels=ids).loss), optimizer.engine.method


CASES = [("closed-form", "closed-form"), ("improved", "zo-finetuner"), ("paper", "zo-finetuner")]


@pytest.mark.parametrize("kind, method", CASES)
def test_a_derivative_takes_it_as_it_is(kind, method, tmp_path, caplog):
    _, path = artefact(kind, llama(2, 32), tmp_path)
    derivative = llama(2, 32)
    with torch.no_grad():
        for parameter in derivative.parameters():
            parameter.mul_(1.02)
    with caplog.at_level(logging.INFO):
        made = make_method(method, derivative, pertnn=path)
        asked = make_method(method, derivative, pertnn=path, transfer=True)
    assert caplog.text.count("was learned for the base; these weights differ from it, as a derivative's do") == 2
    for ours, theirs in zip(_numbers(made), _numbers(asked), strict=True):
        assert torch.equal(ours, theirs), "to ask for a transfer changes nothing where none is needed"


def _numbers(method) -> list[torch.Tensor]:
    return [method.scale] if hasattr(method, "scale") else list(method.scales.nets.state_dict().values())


@pytest.mark.parametrize("kind, method", CASES)
def test_another_depth_and_width_by_the_flag_alone(kind, method, tmp_path, caplog):
    nets, path = artefact(kind, llama(3, 32), tmp_path)
    other = llama(5, 64, tied=False)
    with pytest.raises(InputError, match="other names or shapes .* or map its blocks to these with --transfer"):
        make_method(method, other, pertnn=path)
    with caplog.at_level(logging.WARNING):
        loss, made = step(other, method, pertnn=path, transfer=True, batch_size=2)
    assert bool(loss.isfinite())
    blocks = trainable_blocks(other)
    said = f"transfer: all {len(blocks)} blocks take what the nearest of the {len(nets.names)} of {path} (the base) has"
    assert said in caplog.text
    taken = dict(zip(blocks.names, nearest_blocks(nets.names, blocks.names, ""), strict=True))
    place = {name: i for i, name in enumerate(nets.names)}
    for layer, nearest in enumerate((0, 0, 1, 1, 2)):  # depths 0 .25 .5 .75 1 on 0 .5 1: the first of equals
        for part in ("self_attn.v_proj", "input_layernorm", "post_attention_layernorm"):
            assert taken[f"model.layers.{layer}.{part}.weight"] == place[f"model.layers.{nearest}.{part}.weight"]
    assert taken["model.norm.weight"] == place["model.norm.weight"]
    assert taken["lm_head.weight"] == taken["model.embed_tokens.weight"] == place["model.embed_tokens.weight"]
    rows = torch.tensor([taken[name] for name in blocks.names])
    if kind == "closed-form":
        s = nets.log_base.detach().exp()[rows]
        assert torch.allclose(made.scale / made.scale[0], s / s[0], rtol=2e-3)
    elif kind == "improved":
        assert torch.equal(made.scales.nets.log_base, nets.log_base[rows])
        assert torch.equal(made.scales.nets.x, static_inputs(blocks.names, blocks.numels))
        assert torch.equal(made.scales.nets.w2, nets.w2)
    else:
        assert torch.equal(made.scales.nets.w1, nets.w1[rows]) and torch.equal(made.scales.nets.b2, nets.b2[rows])


def test_nets_in_memory_and_width_alone():
    base = llama(2, 32)
    blocks = trainable_blocks(base)
    nets = PertNN.fresh(blocks.names)
    same = transferred(nets, blocks.names, blocks.numels)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), nets.parameters(), strict=True))
    deeper = llama(3, 32)
    with pytest.raises(InputError, match="no network for model.layers.2"):
        make_method("zo-finetuner", deeper, pertnn=nets)
    assert len(make_method("zo-finetuner", deeper, pertnn=nets, transfer=True).scales.nets.names) == 29


def test_what_cannot_be_transferred():
    nets = PertNN.fresh(trainable_blocks(llama(2, 32)).names)
    with pytest.raises(InputError, match=r"no block is of the kind of .*bias \(bias\), there are embedding, q, k, v"):
        make_method("zo-finetuner", tiny("opt"), pertnn=nets, transfer=True)
    with pytest.raises(InputError, match="nothing to transfer is given: give --pertnn FILE"):
        RunConfig(model="m", task="sst2", output_dir="o", optimizer="zo-finetuner", transfer=True).check()
