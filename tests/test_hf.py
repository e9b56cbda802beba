"""The mixin on an unmodified Trainer: schedules, accumulation, checkpoints, bit-equal resume."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import tiny, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

from zo_finetuner.hf import ZOTrainer, ZOTrainerMixin
from zo_finetuner.optim import MeZO


class Rows(torch.utils.data.Dataset):
    """32 rows of 8 to 11 counted tokens: micro-batches weigh differently."""

    def __init__(self):
        self.ids = tokens(32, 12)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: i % 4] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def arguments(folder, batch=8, accumulate=1, steps=6, **more):
    defaults = dict(
        max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        learning_rate=1e-2, lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, seed=7,
    )
    return TrainingArguments(str(folder), **(defaults | more))


def run(folder, dtype=torch.float32, zo=None, callbacks=(), resume=None, **more):
    model = tiny("llama-tied", dtype)
    trainer = ZOTrainer(
        model=model, args=arguments(folder, **more), train_dataset=Rows(), zo=zo or {"eps": 1e-2},
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def losses(trainer):
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


def test_eight_by_one_equals_two_by_four(tmp_path):
    """The window is evaluated under one perturbation, so its split into micro-batches changes fp32 rounding only."""
    whole, split = run(tmp_path / "a", batch=8, accumulate=1), run(tmp_path / "b", batch=2, accumulate=4)
    assert losses(whole) == pytest.approx(losses(split), abs=3e-6)
    # 1 ulp of the loss (4.8e-7) moves g by 2.4e-5 at eps 1e-2, times lr 1e-2, z up to 4, 6 steps
    assert (weights(whole) - weights(split)).abs().max() < 2e-5
    assert (weights(whole) - torch.cat([p.flatten() for p in tiny("llama-tied").parameters()])).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["mezo", "zo-finetuner", "lozo-m"])
def test_resume_is_bit_equal(tmp_path, dtype, method, monkeypatch):
    told = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *_, **__: told.append(message))

    class StopAt3(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step >= 3

    zo = {"optimizer": method, "eps": 1e-2}
    kept = dict(save_strategy="steps", save_steps=3)
    whole = run(tmp_path / "whole", dtype, zo, **kept)
    run(tmp_path / "part", dtype, zo, callbacks=[StopAt3()], **kept)
    resumed = run(tmp_path / "part", dtype, zo, resume=str(tmp_path / "part" / "checkpoint-3"), **kept)
    assert torch.equal(weights(whole), weights(resumed))
    assert losses(whole) == losses(resumed)
    assert not [message for message in told if "missing keys" in message]  # the tied head is the embedding's


def test_the_schedule_acts_and_g_is_logged(tmp_path):
    trainer = run(tmp_path)
    log = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["learning_rate"] for e in log] == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)])
    assert all(e["grad_norm"] == pytest.approx(abs(e["zo/projected_grad"])) for e in log)
    assert trainer.zo_optimizer.engine.step_count == 6


def test_a_bad_window_is_skipped_and_the_log_stays_finite(tmp_path):
    calls = []

    class Breaks(ZOTrainerMixin, Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            calls.append(1)
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * float("nan") if len(calls) == 4 else loss  # the second probe of step 1

    trainer = Breaks(model=tiny("llama"), args=arguments(tmp_path, steps=4), train_dataset=Rows(), zo={"eps": 1e-2})
    trainer.train()
    assert trainer.zo_optimizer.engine.metrics()["skipped_steps"] == 1
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))
    assert torch.isfinite(weights(trainer)).all()


def test_mixed_precision_is_the_forwards_under_autocast(tmp_path):
    """The Trainer's bf16 casts the weights of every probe, whose losses are other than those of fp32."""

    class Cast(ZOTrainerMixin, Trainer):
        def compute_loss(self, *args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return super().compute_loss(*args, **kwargs)

    own = Cast(model=tiny("llama-tied"), args=arguments(tmp_path), train_dataset=Rows(), zo={"eps": 1e-2})
    own.train()
    mixed, plain = run(tmp_path / "mixed", bf16=True), run(tmp_path / "plain")
    assert losses(mixed) == losses(own) != losses(plain)
    assert torch.equal(weights(mixed), weights(own)) and weights(mixed).dtype == torch.float32


def test_zo_finetuner_takes_the_whole_batch_into_its_budget(tmp_path):
    trainer = run(tmp_path, zo={"optimizer": "zo-finetuner", "eps": 1e-2}, batch=2, accumulate=4, steps=1)
    method = trainer.zo_optimizer.engine.method
    embedding = trainer.zo_optimizer.engine.blocks.index["model.embed_tokens.weight"]
    assert method.budget[embedding].item() == pytest.approx(32 * 15 * 8 / 1e6)


def test_a_method_can_be_given_ready_made(tmp_path):
    method = MeZO(dist="rademacher")
    trainer = run(tmp_path, zo={"optimizer": method}, steps=1)
    assert trainer.zo_optimizer.engine.method is method


def test_peft_model_trains_and_saves_its_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = ZOTrainer(
        model=model, args=arguments(tmp_path, steps=2), train_dataset=Rows(), zo={"eps": 1e-2},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == 4
