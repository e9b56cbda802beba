"""The demo's world is what it says, and the demo runs to its table and picture (shortened)."""

from __future__ import annotations

import json
import random

import pytest

from zo_finetuner import demo
from zo_finetuner.errors import InputError


def test_reviews_have_one_mood_and_the_pretraining_verdict_none():
    rng = random.Random(0)
    for mood, words, others in ((0, demo.BAD, demo.GOOD), (1, demo.GOOD, demo.BAD)):
        for _ in range(50):
            text = demo.review(mood, rng).split()
            assert set(text) & set(words) and not set(text) & set(others)
    texts = [demo.pretraining_text(rng) for _ in range(4000)]
    good = [t for t in texts if set(t.split()) & set(demo.GOOD)]
    share = [sum(t.endswith("great .") for t in some) / sum("It was" in t for t in some) for some in (good, texts)]
    assert all(abs(s - 0.5) < 0.06 for s in share)  # 4 standard errors at 1,000 verdicts


def test_the_demo_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PRETRAIN_STEPS", 5)
    summary = demo.run_demo(tmp_path / "out", steps=15)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "MeZO" in printed and "freshly initialised, not learned" in printed
    assert summary["mezo"]["forwards"] == 30
    demo.run_demo(tmp_path / "out", steps=15)  # a second time over the first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no demo"):
        demo.run_demo(tmp_path / "other")
