"""Other people's trainers and callbacks around our steps: TRL's SFTTrainer, early stopping, tensorboard, the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from models import save_model, tiny
from test_adapters import adapted, base, train  # noqa: F401  (base: a fixture)
from test_hf import Rows, arguments, losses, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

from zo_finetuner import hub
from zo_finetuner.errors import InputError
from zo_finetuner.hf import ZOTrainer
from zo_finetuner.journal import read_journal

# --- TRL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sft"))


def sft(folder, out, dtype="float32", batch=8, accumulate=1, rows=None, zo=None, **more):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from zo_finetuner.sft import ZOSFTTrainer

    texts = ["It was great and the film was good .", "the plot was dull and cold .", "bad .", "the acting was fine ."]
    rows = rows or [{"text": text} for text in texts * 8]
    settings = trl.SFTConfig(
        str(out), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=4, bf16=False,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        max_length=32, seed=7, **more,
    )  # fmt: skip
    trainer = ZOSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)), args=settings,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=AutoTokenizer.from_pretrained(folder), zo={"eps": 1e-2} | (zo or {}),
    )
    trainer.train()
    return trainer


def test_sft_trainer_takes_our_steps(folder, tmp_path):
    """The loss of its first step is that of the base model on its own first batch, at theta + and - eps z."""
    whole = sft(folder, tmp_path / "a")
    split = sft(folder, tmp_path / "b", batch=2, accumulate=4)
    assert losses(whole) == pytest.approx(losses(split), abs=5e-6)
    assert whole.zo_optimizer.engine.step_count == 4 and len(losses(whole)) == 4
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert (weights(whole) - torch.cat([p.flatten() for p in before.parameters()])).abs().max() > 1e-4
    batch = next(iter(whole.get_train_dataloader()))
    with torch.no_grad():
        own = before(input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=batch["attention_mask"]).loss
    counted = [(labels != -100).sum() for labels in (batch["labels"][:, 1:], batch["labels"])]
    divided = (float(own), float(own * counted[0] / counted[1]))  # transformers 5.0 also counts the first tokens
    assert any(losses(whole)[0] == pytest.approx(expected, abs=2e-2) for expected in divided)  # eps 1e-2 to both sides
    metrics = whole.evaluate()
    assert metrics["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"])  # nothing of training is left in it
    whole.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved") is not None


@pytest.mark.parametrize("probing", ["scratch", "paired"])
def test_sft_trainer_with_16_bit_weights(folder, tmp_path, probing):
    """SFTTrainer's own loss reads the head past its module, which a scratch could not follow."""
    trainer = sft(folder, tmp_path, "bfloat16", zo={"probing": probing})
    assert trainer.zo_optimizer.engine.probing.mode == probing
    assert torch.isfinite(torch.tensor(losses(trainer))).all()


def test_sft_trainer_on_prompts_and_completions(folder, tmp_path):
    rows = [{"prompt": "the film was", "completion": " good ."}, {"prompt": "the plot was", "completion": " bad ."}] * 8
    trainer = sft(folder, tmp_path, rows=rows)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels == -100).any() and len(losses(trainer)) == 4


def test_sft_losses_of_other_kinds_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="steps minimise nll"):
        sft(folder, tmp_path, loss_type="dft")


# --- callbacks


def test_early_stopping(tmp_path):
    trainer = ZOTrainer(
        model=tiny("llama-tied"), train_dataset=Rows(), eval_dataset=torch.utils.data.Subset(Rows(), range(8)),
        zo={"eps": 1e-2}, callbacks=[EarlyStoppingCallback(2)],
        args=arguments(
            tmp_path, steps=30, learning_rate=1e-12, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        ),
    )  # fmt: skip
    trainer.train()  # a rate that moves nothing but rounding: it ends long before 30
    assert trainer.state.global_step < 30 and trainer.zo_optimizer.engine.step_count == trainer.state.global_step


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = ZOTrainer(
        model=tiny("llama"), args=arguments(tmp_path, steps=3, report_to="tensorboard"), train_dataset=Rows(),
        zo={"eps": 1e-2},
    )
    trainer.train()
    events = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    written = EventAccumulator(str(events[0])).Reload()
    seen = {tag: written.Scalars(tag) for tag in written.Tags()["scalars"]}
    assert [event.value for event in seen["train/loss"]] == pytest.approx(losses(trainer), rel=1e-6)
    assert len(seen["train/zo/projected_grad"]) == len(seen["train/learning_rate"]) == 3


# --- the Hub: a stand-in that keeps what it is sent in a folder


class LocalHub:
    def __init__(self, root, logged_in=True):
        self.root, self.logged_in, self.made = Path(root), logged_in, []

    def whoami(self):
        if not self.logged_in:
            raise OSError("Token is required, but no token found.")
        return {"name": "me"}

    def create_repo(self, repo_id, **settings):
        self.made.append((repo_id, settings))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, **_):
        shutil.copy(path_or_fileobj, self.root / repo_id / path_in_repo)


def card_of(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md")


def test_zo_train_writes_a_card_and_sends_the_run(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    local = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "_api", lambda: local)
    assert train(base, tmp_path / "out", "--adapter", "prefix", "--push-to-hub", "me/reviews") == 0
    sent = tmp_path / "hub" / "me" / "reviews"
    assert local.made == [("me/reviews", {"private": True, "exist_ok": True})]
    assert {"README.md", "adapter_model.safetensors", "journal.zoj", "result.json", "config.yaml"} <= {
        path.name for path in sent.iterdir()
    }
    card = card_of(sent)
    assert card.data.library_name == "peft" and {"zo-finetuner", "zeroth-order", "mezo"} <= set(card.data.tags)
    assert [r.metric_type for r in card.data.eval_results] == ["loss", "accuracy"]
    text = card.text
    assert "prefix adapter: 1 tensors" in text and "| eps | 0.1 |" in text and "| steps | 4, 8 forwards |" in text
    assert "`journal.zoj` holds 4 steps" in text and read_journal(sent / "journal.zoj").steps == 4
    assert "Version 1:" in text and "| loss | " in text and "| accuracy | " in text
    assert "pushed to https://hub/me/reviews" in capsys.readouterr().out


def test_a_push_that_cannot_be_is_told_before_the_first_step(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(hub, "_api", lambda: LocalHub(tmp_path, logged_in=False))
    for name, message in (("nobody", "give USER/NAME"), ("me/reviews", "hf auth login")):
        assert train(base, tmp_path / "out", "--push-to-hub", name) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_run_whole(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    local = LocalHub(tmp_path / "hub")
    local.upload_folder = lambda **_: (_ for _ in ()).throw(ConnectionError("no route"))
    monkeypatch.setattr(hub, "_api", lambda: local)
    assert train(base, tmp_path / "out", "--push-to-hub", "me/reviews") == 2
    assert "the run is whole in" in capsys.readouterr().err and (tmp_path / "out" / "result.json").is_file()


def test_the_trainers_push_sends_our_card_and_the_journal(tmp_path, monkeypatch):
    import transformers.trainer as module
    from huggingface_hub import HfApi, RepoUrl

    sent = {}

    def create_repo(*_, **__):
        return RepoUrl("https://huggingface.co/me/run")

    def upload_folder(*_, **given):
        sent.update(given)

    for name, stand_in in (("create_repo", create_repo), ("upload_folder", upload_folder)):
        monkeypatch.setattr(HfApi, name, stand_in)
        monkeypatch.setattr(module, name, stand_in, raising=False)  # transformers before 5.20 calls them as functions
    trainer = ZOTrainer(
        model=adapted("lora"), train_dataset=Rows(), eval_dataset=torch.utils.data.Subset(Rows(), range(8)),
        args=arguments(tmp_path, steps=3, eval_strategy="steps", eval_steps=1, hub_model_id="me/run", hub_token="x"),
        zo={"journal": tmp_path / "journal.zoj"},
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(tags="reviews", dataset="film-reviews")
    assert sent["repo_id"] == "me/run" and Path(sent["folder_path"]) == tmp_path
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "journal.zoj").is_file()
    card = card_of(tmp_path)
    assert card.data.tags[-1] == "reviews" and card.data.library_name == "peft"
    assert "fine-tuned on `film-reviews`" in card.text and "`journal.zoj` holds 3 steps" in card.text
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert f"| loss | {held_out[0]:.4f} | {held_out[-1]:.4f} |" in card.text
