"""The Trainer's step: nothing in it looks at a value on the device, and as graphs it has the bits of eager steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_graphs import EmulatedCapturer, as_on_a_gpu  # noqa: F401 (a fixture of every test)
from models import save_model, save_rows, tiny
from test_hf import Rows, arguments, losses, weights
from torch.utils._python_dispatch import TorchDispatchMode

from zo_finetuner import training
from zo_finetuner.capturable import obstacle
from zo_finetuner.config import RunConfig
from zo_finetuner.errors import InputError
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.training import train, use_graphs


class NoWaits(TorchDispatchMode):
    """What `torch.cuda.set_sync_debug_mode("error")` does on a GPU.  Seeds and the rate may be sent: from pinned memory
    that takes no wait (`step_inputs.py`)."""

    watched = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reason = obstacle(func, args, kwargs or {})
        if reason and func is not torch.ops.aten.lift_fresh.default:
            raise AssertionError(f"{func}: {reason}")
        NoWaits.watched += 1
        return func(*args, **kwargs or {})


class Watched(ZOTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 0:  # coverage, realised share, rehearsal
            return super().training_step(*args, **kwargs)
        with NoWaits():
            return super().training_step(*args, **kwargs)


def run(folder, trainer=ZOTrainer, objective=None, steps=4, **zo):
    model = tiny("llama-tied", torch.bfloat16)
    del model.model.layers[1:]
    trainer = trainer(
        model=model, args=arguments(folder, batch=2, accumulate=2, steps=steps, logging_nan_inf_filter=False),
        train_dataset=Rows(), zo={"eps": 1e-2, **zo}, objective=objective,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["mezo", "zo-finetuner"])
@pytest.mark.parametrize("probing", ["scratch", "paired", "inplace"])
def test_no_step_of_the_trainer_waits(tmp_path, method, probing):
    NoWaits.watched = 0
    trainer = run(tmp_path, Watched, optimizer=method, probing=probing)
    assert trainer.zo_optimizer.engine.step_count == 4
    assert NoWaits.watched > 1000
    assert not getattr(trainer.zo_optimizer.engine.probing, "reason", "")


def test_a_wait_would_be_seen(tmp_path):
    class Waits(Watched):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss if loss < 1e9 else loss * 2

    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        run(tmp_path, Waits)


@pytest.mark.parametrize("method", ["mezo", "zo-finetuner"])
def test_the_trainers_steps_as_graphs_have_the_bits_of_eager_ones(tmp_path, method):
    eager = run(tmp_path / "eager", steps=6, optimizer=method)
    graphed = run(tmp_path / "graphed", steps=6, optimizer=method, graphs=EmulatedCapturer())
    graphs = graphed.zo_optimizer.graphs
    assert not graphs.reason and graphs.replays == 4  # the first checks, the second is watched
    assert torch.equal(weights(eager), weights(graphed)) and losses(eager) == losses(graphed)
    assert logged(eager) == logged(graphed)


def test_zo_train_with_graphs_has_the_bits_of_eager_steps(tmp_path, monkeypatch):
    """Checkpoints, evaluations and the best model's return between replays; batches of few shapes in both."""
    config = RunConfig(
        model=str(save_model(tmp_path / "model", torch.bfloat16)), task="sst2", data=str(save_rows(tmp_path / "data")),
        steps=6, batch_size=4, lr=1e-3, eps=1e-2, num_train=24, num_dev=8, num_eval=8, eval_steps=3, logging_steps=1,
    )  # fmt: skip
    results, EmulatedCapturer.replayed = [], 0
    for name, choice in (("eager", EagerSteps), ("graphed", EmulatedCapturer)):
        monkeypatch.setattr(training, "use_graphs", lambda *_, choice=choice: choice())
        results.append(train(replace(config, output_dir=str(tmp_path / name))))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("eager", "graphed")]
    keep = ("eval_loss_after", "eval_metric_after", "best_dev_loss", "skipped_steps")
    assert [results[0][key] for key in keep] == [results[1][key] for key in keep]
    first, second = (torch_weights(tmp_path / name / "model") for name in ("eager", "graphed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert logs[0].count('"loss"') == logs[1].count('"loss"') == 6
    assert EmulatedCapturer.replayed > 0


def logged(trainer):
    """The entries of the steps, without what the clock says."""
    clock = ("zo/seconds_per_step", "zo/tokens_per_second")
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if name not in clock} for entry in steps]


class EagerSteps:
    """Graphs as far as batches are concerned; but no capture succeeds."""

    bytes = 0

    def capture(self, run):
        raise RuntimeError("no capture here")


def torch_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_graphs_need_a_gpu():
    model = tiny("llama")
    assert not use_graphs("auto", model) and not use_graphs("never", model)
    with pytest.raises(InputError, match="graphs always: the model is on cpu; CUDA graphs need one GPU"):
        use_graphs("always", model)
    with pytest.raises(InputError, match="CUDA graphs need a model on a CUDA device, this one is on cpu"):
        run("unused", graphs=True)
    with pytest.raises(InputError, match='unknown graphs "often"'):
        RunConfig(model="m", task="sst2", output_dir="o", graphs="often").check()
