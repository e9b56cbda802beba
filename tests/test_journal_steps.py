"""The journal within a step: nothing waits for the device, and CUDA graphs write what eager steps do."""

from __future__ import annotations

import pytest
from emulated_graphs import EmulatedCapturer, as_on_a_gpu  # noqa: F401 (a fixture of every test)
from test_waits import Watched
from test_waits import run as train_briefly

from zo_finetuner.journal import read_journal


@pytest.mark.parametrize("method", ["mezo", "zo-finetuner", "mezo-gv"])
def test_no_step_with_a_journal_waits(tmp_path, method):
    train_briefly(tmp_path / "run", Watched, optimizer=method, journal=tmp_path / "j.zoj")
    assert read_journal(tmp_path / "j.zoj").steps == 4


def test_steps_as_graphs_write_the_journal_of_eager_ones(tmp_path):
    for name, graphs in (("eager", False), ("graphed", EmulatedCapturer())):
        trainer = train_briefly(tmp_path / name, steps=6, optimizer="zo-finetuner", graphs=graphs,
                                journal=tmp_path / f"{name}.zoj")  # fmt: skip
        assert not graphs or trainer.zo_optimizer.graphs.replays == 4
    eager, graphed = (tmp_path / f"{name}.zoj" for name in ("eager", "graphed"))
    assert read_journal(eager).steps == 6 and eager.read_bytes() == graphed.read_bytes()
    assert read_journal(eager).header.run["gradient_accumulation_steps"] == 2
