"""`zo report`: what a page shows of runs, that it needs nothing from outside, and one line for every broken folder."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml
from models import save_model, save_rows

from zo_finetuner import curves
from zo_finetuner.cli import main
from zo_finetuner.report_page import html_page, write_report
from zo_finetuner.runs import Run, brief, grouped, read_run

KINDS = ("norm", "embedding", "q", "k", "v", "o", "gate", "up", "down")


def config(**more):
    return {"model": "models/tiny", "task": "sst2", "optimizer": "mezo", "lr": 1e-4, "steps": 40, "seed": 0,
            "output_dir": "x", **more}  # fmt: skip


def history(forwards=2, final=0.6, steps=40, **more):
    entries = []
    for step in range(1, steps + 1):
        entries.append({
            "step": step, "loss": 0.7 + 0.01 * (step % 3), "grad_norm": 10.0 ** (step % 4), "learning_rate": 1e-4,
            "zo/forwards": float(forwards * step), "zo/skipped_steps": 0.0, "zo/seconds_per_step": 0.1,
            "zo/tokens_per_second": 4000.0, **more,
        })  # fmt: skip
        if step % 10 == 0:
            entries.append({"step": step, "eval_loss": 0.7 - (0.7 - final) * step / steps, "eval_accuracy": 0.5})
    return entries


def ended(final=0.6):
    return {"metric": "accuracy", "eval_loss_before": 0.7, "eval_loss_after": final, "eval_metric_before": 0.5,
            "eval_metric_after": 0.6, "eval_rows": 100, "steps": 40, "forwards": 80, "seconds": 75.0,
            "prior_loss": 0.69, "skipped_steps": 0, "peak_bytes": {"training": None},
            "data": {"origin": "rows"}}  # fmt: skip


def a_run(name="runs/a", forwards=2, final=0.6, log=None, result=True, **settings):
    entries = history(forwards, final) if log is None else log
    return Run(name, config(**settings), entries, ended(final) if result else {})


class Outside(HTMLParser):
    """Collects what a browser would fetch, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [(tag, k, v) for k, v in attrs if k in ("src", "data") or (k.endswith("href") and v[0] != "#")]
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append((tag, "", ""))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.fetched += [(tag, k, v) for k, v in attrs if k.endswith("href") and v[0] != "#"]


def page_of(*runs) -> str:
    text = html_page(runs, grouped(runs))
    reader = Outside()
    reader.feed(text)
    assert not reader.fetched and not reader.open
    assert "url(http" not in text and "@import" not in text
    return text


def titles(*runs) -> list[str]:
    return [panel.title for panel in curves.panels(grouped(runs))]


def test_a_page_of_one_run_has_results_and_curves():
    text = page_of(a_run())
    assert "sst2 on tiny" not in text and "sst2 on models/tiny, mezo" in text
    assert "0.7000 &rarr; <b>0.6000</b>, accuracy 0.500 &rarr; <b>0.600</b> on 100 test rows, 80 forwards" in text
    assert text.count("<svg") == len(titles(a_run())) == 6
    assert "always the training prior" in text and "currentColor" in text and curves.INK not in text
    assert len(text) < 200_000


def test_panels_follow_the_log():
    assert titles(a_run()) == [
        "training loss", "held-out loss (dev rows)", "held-out accuracy (dev rows)", "|g|, the projected gradient",
        "seconds of a step", "tokens per second",
    ]  # fmt: skip
    scales = {f"zo/sigma/{kind}": 1.0 + number for number, kind in enumerate(KINDS)}
    log = history(**scales)
    log[5] |= {"zo/skipped_steps": 1.0, "learning_rate": 5e-5, "loss": math.nan}
    run = a_run(log=log)
    more = {"skipped steps so far", "sigma by kind of block", "learning rate"}
    assert set(titles(run)) - set(titles(a_run())) == more
    sigma = next(p for p in curves.panels(grouped([run])) if p.title.startswith("sigma"))
    assert [line.label for line in sigma.lines] == list(KINDS)
    assert [line.y[0] for line in sigma.lines] == [1.0 + number for number in range(len(KINDS))]
    page_of(run)


def test_steps_become_forwards_where_every_run_says_how_many():
    (loss, *_) = curves.panels(grouped([a_run()]))
    assert loss.x == "forwards" and loss.steps == 0.5 and max(loss.lines[0].x) == 80
    both = a_run(), a_run("runs/b", forwards=9, optimizer="fzoo")
    assert "held-out loss against steps" in titles(*both)
    shown = {panel.title: panel for panel in curves.panels(grouped(both))}
    assert [max(line.x) for line in shown["held-out loss (dev rows)"].lines] == [80, 360]
    assert [max(line.x) for line in shown["held-out loss against steps"].lines] == [40, 40]
    old = [{k: v for k, v in entry.items() if k != "zo/forwards"} for entry in history()]
    (loss, *_) = curves.panels(grouped([a_run(), a_run("runs/b", log=old, result=False, lr=1e-3)]))
    assert loss.x == "steps" and loss.steps is None


def test_seeds_share_a_colour_and_have_a_median():
    seeds = [a_run(f"runs/{seed}", final=0.6 - 0.01 * seed, seed=seed, output_dir=str(seed)) for seed in range(3)]
    other = a_run("runs/es", final=0.5, optimizer="es", output_dir="es")
    groups = grouped([*seeds, other])
    assert [(group.label, len(group.runs)) for group in groups] == [("mezo (3 seeds)", 3), ("es", 1)]
    held = next(p for p in curves.panels(groups) if p.title.startswith("held-out loss"))
    assert [line.style for line in held.lines] == ["thin", "thin", "thin", "points", "points"]
    assert held.lines[3].y[-1] == pytest.approx(0.59) and held.lines[3].colour == held.lines[0].colour
    assert held.lines[4].colour != held.lines[0].colour
    text = page_of(*seeds, other)
    assert "<td>0.5900</td><td>0.5800 to 0.6000</td>" in text
    assert "Lowest at the end: runs/es" in text


def test_labels_name_as_few_settings_as_tell_groups_apart():
    runs = [a_run("runs/a"), a_run("runs/b", optimizer="es", steps=9), a_run("runs/c", optimizer="es", steps=9, lr=1.0)]
    assert [group.label for group in grouped(runs)] == ["mezo, lr 0.0001", "es, lr 0.0001", "es, lr 1"]
    assert [group.label for group in grouped(runs[:1])] == ["a"]


def test_a_setting_whose_name_is_a_number_is_no_crash():
    odd = a_run()
    odd.config[1] = None
    assert len(grouped([a_run(), odd])) == 2


def test_runs_on_other_test_rows_are_not_ranked():
    text = page_of(a_run(num_eval=100), a_run("runs/b", num_eval=200))
    assert "differ in num_eval: their test losses do not compare" in text and "Lowest" not in text


def test_settings_that_differ_stand_in_a_table_and_the_others_are_folded():
    text = page_of(a_run(lr=1e-4), a_run("runs/b", lr=3e-4, set={"probes": 4}))
    differ = text[text.index("Settings that differ") : text.index("<details>")]
    assert "<th>lr</th><th>set</th>" in differ and "<td>0.0003</td><td>probes=4</td>" in differ
    assert "optimizer: mezo" in text[text.index("<details>") :]


def test_a_run_that_goes_on_is_shown_as_far_as_it_got():
    run = a_run(log=history(steps=20), result=False)
    text = page_of(run)
    assert "Not ended: 20 of 40 steps are in the log" in text and "20 of 40" in text
    assert "The log has no entry yet" in page_of(a_run(log=[], result=False))
    assert "No run has ended yet" in page_of(run, a_run("runs/b", log=[], result=False, lr=1.0))


def test_names_are_text_and_not_markup(tmp_path):
    nasty = '<script>alert("$x_")</script> & $\\frac$ _'
    runs = [a_run(f"_{nasty}{i}", optimizer=nasty, task=nasty, lr=i) for i in range(2)]
    write_report(runs, tmp_path / "page.html", tmp_path / "page.png")
    text = page_of(*runs)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_long_series_are_thinned_to_means():
    x, y = curves.thinned(range(1, 1001), [float(i % 2) for i in range(1000)])
    assert len(y) == 250 and set(y) == {0.5} and x[-1] == 1000 and x[0] == 4
    assert curves.smoothed([1.0] * 40) == [1.0] * 40
    assert curves.median_of([([1, 2, 3], [1.0, 5.0, 0.0]), ([2, 3], [7.0, 4.0])]) == ([2, 3], [6.0, 2.0])


@pytest.mark.parametrize(("value", "text"), [(1e-6, "1e-06"), ({"a": 0.5}, "a=0.5"), (None, "-"), ("/x/y/z", "z"),
                                             ("org/name", "org/name"), (True, "True")])  # fmt: skip
def test_settings_are_short(value, text):
    assert brief(value) == text


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump(config()))
    (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history()))
    (out / "result.json").write_text(json.dumps(ended()))
    return out


def test_a_folder_is_read_whole_and_its_page_is_in_it(folder, capsys):
    run = read_run(folder)
    assert (run.history, run.result) == (history(), ended())
    assert config().items() <= run.config.items() and run.config["batch_size"] == 16  # a setting of its time's default
    assert main(["report", str(folder)]) == 0
    assert re.match(rf"{folder}/report.html \(\d+ KB\), {folder}/curve.png\n", capsys.readouterr().out)
    assert "<svg" in (folder / "report.html").read_text() and main(["report", str(folder)]) == 0
    with (folder / "log.jsonl").open("a") as stream:
        stream.write('{"step": 41, "lo')  # a line that is being written
    assert read_run(folder).history == history()


def test_a_page_of_several_runs_replaces_nothing_by_itself(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(yaml.safe_dump(config(lr=1e-3)))
    argv = ["report", str(folder), str(other), "--output", str(tmp_path / "new" / "both.html")]
    assert main(argv) == 0 and (tmp_path / "new" / "both.png").exists()
    assert main(argv) == 2
    assert "both.html: exists; give --output another name, or --overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", None, "run: holds no run (there is no config.yaml)"),
        ("config.yaml", "lr: [", "config.yaml:"),
        ("log.jsonl", '{"step": 1, "loss": 1}\nnonsense\n', "log.jsonl:2: not JSON at column 1"),
        ("log.jsonl", '{"loss": 1}\n', 'log.jsonl:1: must be an object with a whole number as "step"'),
        ("log.jsonl", '{"step": "one"}\n', "log.jsonl:1: must be an object"),
        ("log.jsonl", "[1]\n", "log.jsonl:1: must be an object"),
        ("log.jsonl", b"\xff\n", "log.jsonl: byte 1 (0xff) is not UTF-8"),
        ("result.json", '{"steps": ', "result.json: not JSON"),
        ("result.json", "[]", "result.json: holds a list, not a JSON object"),
    ],
)
def test_a_broken_folder_is_one_line(folder, capsys, name, content, words):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zo: error: ") and error.count("\n") == 1 and words in error
    assert not (folder / "report.html").exists()


def test_what_cannot_be_reported_is_one_line(folder, tmp_path, capsys):
    for argv, words in (
        ([str(tmp_path / "none")], "none: is no folder; give one that `zo train` wrote"),
        ([str(folder), str(folder)], "a run is named twice"),
        ([str(folder), "--output", "page.pdf"], "page.pdf: the page is a .html; change the suffix"),
    ):
        assert main(["report", *argv]) == 2
        assert words in capsys.readouterr().err


def test_odd_values_of_a_log_are_left_out_and_break_nothing():
    for key in ("loss", "eval_loss", "grad_norm"):
        odd = ("text", None, [1], math.inf, True, -1.0, 0.0)
        logs = [[entry | ({key: value} if key in entry else {}) for entry in history()] for value in odd]
        page_of(*(a_run(f"runs/{i}", log=log, result=False, lr=i) for i, log in enumerate(logs)))


def test_zo_train_leaves_a_page(tmp_path):
    save_model(tmp_path / "model")
    save_rows(tmp_path / "data")
    argv = ["train", "--model", tmp_path / "model", "--task", "sst2", "--data", tmp_path / "data", "--steps", 4,
            "--batch-size", 4, "--num-train", 16, "--num-dev", 8, "--num-eval", 8, "--logging-steps", 1, "--optimizer",
            "zo-finetuner", "--output-dir", tmp_path / "run"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "sigma by kind of block" in text and "tokens per second" in text and "forwards" in text
    assert read_run(tmp_path / "run").forwards_per_step == 2
