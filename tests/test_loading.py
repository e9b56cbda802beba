"""Models from a config alone, drawn where they will be used; checkpoints that stream past the host."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from models import save_model, save_rows
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.__main__ import main as bench
from bench.loading import measure
from bench.rows import read
from zo_finetuner.cli import main
from zo_finetuner.errors import InputError
from zo_finetuner.loading import empty_model, load_model, random_model


@pytest.fixture
def bare(tmp_path):
    """A model folder with a config and a tokenizer, and no weights."""
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_random_model_has_the_configs_shapes_and_scale(bare, caplog):
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        model = random_model(str(bare), "bfloat16")
    assert "RANDOM" in caplog.text and str(bare) in caplog.text
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    shapes = {name: p.shape for name, p in empty_model(str(bare)).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    matrices = torch.cat([p.flatten() for p in model.parameters() if p.dim() == 2]).float()
    # initializer_range is .02; the standard error of the spread of n normals is .02 / sqrt(2 n): five of them.
    assert abs(matrices.std() - 0.02) < 5 * 0.02 / (2 * matrices.numel()) ** 0.5
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters() if p.dim() == 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_draw_follows_the_seed(bare):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.cat([p.flatten() for p in random_model(str(bare)).parameters()]))
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


class HostTensors(TorchDispatchMode):
    """largest: bytes of the largest tensor that any operator made on the host."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return out


def test_a_random_model_is_made_on_its_device_and_nowhere_else(bare):
    """The device is meta here: what would be on a GPU is not on the host."""
    with HostTensors() as host:
        model = random_model(str(bare), "float16", "meta")
    assert host.largest <= 8  # a number now and then
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta for t in tensors) and sum(t.nbytes for t in tensors) > 10_000


def test_random_weights_need_a_config_and_a_tokenizer_only(bare):
    with pytest.raises(InputError, match="no .safetensors file"):
        load_model(str(bare))
    model, tokenizer = load_model(str(bare), random_weights=True)
    assert len(tokenizer) == model.config.vocab_size
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_model(str(bare), random_weights=True)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"model_type": "no-such-thing"}))
    with pytest.raises(InputError, match="cannot be built from its config.*no-such-thing"):
        random_model(str(bare))


def test_weights_that_are_there_are_not_read(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not weights")
    model, _ = load_model(str(folder), random_weights=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["mezo", "zo-finetuner"])
def test_train_with_random_weights_from_end_to_end(bare, tmp_path, optimizer, caplog):
    save_rows(tmp_path / "data")
    settings = dict(
        model=bare, task="sst2", data=tmp_path / "data", output_dir=tmp_path / "run", steps=3, batch_size=4, lr=1e-4,
        num_train=16, num_dev=8, num_eval=8, dtype="bfloat16", optimizer=optimizer,
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert main(["train", "--random-weights", *flags]) == 0
    assert "are RANDOM" in caplog.text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["random_weights"] is True and result["config"]["random_weights"] is True and result["steps"] == 3
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of 80 MB in bfloat16, in shards of 15 MB or less, the largest tensor 4 MB."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_model(tmp_path_factory.mktemp("large"))
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(
        folder, vocab_size=2048, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, head_dim=256
    )
    config.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="15MB")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the model goes there, see below")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_makes_no_second_copy_on_the_host(checkpoint, tmp_path, dtype):
    """Cast to fp32, the host is the destination: beside it at most one tensor (a tied head for a moment).  In the
    checkpoint's own dtype the weights stay pages of the mapped files.  A second copy would be 80 MB or more."""
    taken = measure(save_model(tmp_path / "small"), checkpoint, dtype)
    assert taken.on_host > 0 and taken.anonymous_weights == (taken.on_host if dtype == "float32" else 0)
    python = 2 << 20  # objects, stacks of threads: 0.5 MB measured
    assert taken.extra <= taken.tensor + python


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_to_a_gpu_takes_less_of_the_host_than_a_shard(checkpoint, tmp_path, dtype):
    taken = measure(save_model(tmp_path / "small"), checkpoint, dtype)
    assert taken.on_host == 0
    assert taken.anonymous <= taken.shard + (6 << 20)


@pytest.mark.skipif("ZO_SLOW" not in os.environ, reason="writes 2.5 GB and takes a minute: set ZO_SLOW=1")
def test_a_checkpoint_of_1b_loads_within_a_shard(tmp_path, shared):
    assert bench(["loading", "--shared", str(shared), "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "loading.jsonl")
    assert {r["dtype"] for r in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert row["n"] > 1.2e9 and row["p50"] <= row["shard"] <= 600e6
