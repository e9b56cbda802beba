"""`zo train` and `zo eval` without a task, on rows of one's own."""

from __future__ import annotations

import json
import math

import pytest
from models import save_model
from test_cli import fails, result
from transformers import AutoTokenizer

from zo_finetuner.cli import main

WORDS = "film plot acting good bad fine dull warm cold".split()
TEMPLATE = "{% for m in messages %}{{ 'It ' if m.role == 'assistant' else 'the ' }}{{ m.content }} . {% endfor %}" \
           "{% if add_generation_prompt %}It {% endif %}"


def rows(kind, count=24):
    for i in range(count):
        noun, word = WORDS[i % 3], WORDS[3 + i % 6]
        if kind == "text":
            yield {"text": f"the {noun} was {word} and {WORDS[3 + i // 6]} ."}
        elif kind == "pairs":
            yield {"question": f"the {noun} was", "answer": f" {word} and {WORDS[3 + i // 6]}"}
        else:
            yield {"messages": [{"role": "user", "content": f"{noun} {WORDS[3 + i // 6]}"},
                                {"role": "assistant", "content": word}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(save_model(folder / "model"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    for kind in ("text", "pairs", "chat"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    return folder


def flags(base, out, data, *more, **settings):
    settings = dict(model=base / "model", data=base / data, output_dir=out, steps=2, batch_size=4, lr=1e-3, eps=1e-3,
                    eval_steps=2, logging_steps=1) | settings
    return ["train", *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items()), *more]


@pytest.mark.parametrize(
    ("data", "format", "more"),
    [
        ("text.jsonl", "text", ()),
        ("pairs.jsonl", "prompt-completion", ("--columns", "prompt=question", "--columns", "completion=answer")),
        ("chat.jsonl", "messages", ()),
    ],
)
def test_a_run_without_a_task_and_its_evaluation(base, tmp_path, data, format, more, capsys):
    out = tmp_path / "run"
    assert main(flags(base, out, data, *more)) == 0
    written = result(out)
    assert (written["metric"], written["data"]["format"]) == ("perplexity", format)
    assert written["data"]["rows"] == {"train": 20, "dev": 2, "test": 2}
    assert written["eval_metric_after"] == pytest.approx(math.exp(written["eval_loss_after"]))
    assert written["eval_loss_after"] != written["eval_loss_before"]
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("eval_perplexity" in entry for entry in logged)
    assert (out / "curve.png").is_file() and (out / "model" / "model.safetensors").is_file()

    again = tmp_path / "again"
    assert main(["train", "--config", str(out / "config.yaml"), "--output-dir", str(again)]) == 0
    assert result(again)["eval_loss_after"] == written["eval_loss_after"]

    report = tmp_path / "eval.json"
    evaluate = ["eval", "--model", str(out / "model"), *more]
    assert main([*evaluate, "--data", str(base / data), "--output", str(report)]) == 0
    assert json.loads(report.read_text()) == pytest.approx(
        {"loss": written["eval_loss_after"], "perplexity": written["eval_metric_after"], "n": 2}, rel=1e-5
    )
    assert main([*evaluate, "--test-data", str(base / data)]) == 0
    assert '"n": 24' in capsys.readouterr().out


def test_zo_steps_lower_the_loss_of_completions(base, tmp_path):
    more = ("--columns", "prompt=question", "--columns", "completion=answer", "--no-save-model", "--no-checkpoints")
    out = tmp_path / "run"
    assert main(flags(base, out, "pairs.jsonl", *more, steps=150, batch_size=8, num_dev=2, num_eval=10)) == 0
    assert result(out)["eval_loss_after"] < result(out)["eval_loss_before"] - 0.15  # 3.04 to 2.74 when this was written


def test_faults_are_one_line_before_anything_is_written(base, tmp_path, capsys):
    out = tmp_path / "out"
    fails(capsys, flags(base, out, "pairs.jsonl"), "pairs.jsonl:1", "no format has its columns", "--columns")
    fails(capsys, flags(base, out, "pairs.jsonl", "--columns", "prompt=qestion"), 'no column "qestion"', '"question"')
    fails(capsys, flags(base, out, "pairs.jsonl", "--columns", "prompt"), "--columns takes NAME=VALUE")
    fails(capsys, flags(base, out, "pairs.jsonl", "--columns", "prompt=question"), "no completion", "--objective")
    fails(capsys, flags(base, out, "nowhere.jsonl"), "nowhere.jsonl", "no such file")
    fails(capsys, flags(base, out, "text.jsonl", dev_data=base / "chat.jsonl"), "chat.jsonl:1", "is messages",
          "text.jsonl:1 is text")
    fails(capsys, flags(base, out, "text.jsonl", max_length=1), "text.jsonl:", "leaves no room")
    fails(capsys, flags(base, out, "text.jsonl", task="sst2", dev_data="x"), "dev_data is for rows of your own")
    fails(capsys, ["train", "--model", "m", "--output-dir", "o"], "task is missing", "--data")
    fails(capsys, ["eval", "--model", str(base / "model")], "task is missing", "--data")
    (tmp_path / "empty.jsonl").write_text("\n")
    fails(capsys, flags(base, out, tmp_path / "empty.jsonl"), "empty.jsonl: no rows")
    save_model(tmp_path / "plain")
    fails(capsys, flags(base, out, "chat.jsonl", model=tmp_path / "plain"), "plain", "has no chat template")
    assert not out.exists()
