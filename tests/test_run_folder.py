"""A run's folder: one run at a time, what cannot be written, what is left half written, and stopping it by a signal."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import test_cli
import torch
from forks import start, wait
from safetensors.torch import load_file
from test_cli import fails, flags, result

from zo_finetuner import workload
from zo_finetuner.checkpoints import checkpoints, is_whole
from zo_finetuner.cli import main
from zo_finetuner.errors import InputError
from zo_finetuner.files import whole_folder
from zo_finetuner.journal import read_journal
from zo_finetuner.run_folder import RunFolder
from zo_finetuner.training import TaskTrainer

base = test_cli.base  # a fixture
pytestmark = pytest.mark.usefixtures("without_pictures")


def no_journal(base, out, **more):
    return [*flags(base, out, **more), "--no-journal"]


def same_weights(one, other) -> bool:
    ends = [load_file(out / "model" / "model.safetensors") for out in (one, other)]
    return ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_two_runs_on_one_folder(base, tmp_path, capsys):
    out = tmp_path / "run"
    with RunFolder(out) as first:
        first.open()
        holder = f"pid {os.getpid()} on {os.uname().nodename}"
        for more in ((), ("--resume",), ("--overwrite",)):
            fails(capsys, [*flags(base, out), *more], out, "another run is writing there", holder)
        assert [path.name for path in out.iterdir()] == [".lock"]
    with RunFolder(out) as second:  # the first has ended
        second.open()
    (out / "result.json").write_text("{}")
    fails(capsys, flags(base, out), "holds a run")
    with RunFolder(out, overwrite=True):  # what was refused holds no lock
        pass


def test_a_killed_run_leaves_no_lock(base, tmp_path):
    def hold():
        folder = RunFolder(tmp_path / "run")
        folder.open()
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(start([], tmp_path / "log", hold)) == -signal.SIGKILL
    assert "pid" in (tmp_path / "run" / ".lock").read_text()
    with RunFolder(tmp_path / "run") as folder:
        folder.open()


def test_a_folder_that_cannot_be_written(base, tmp_path, capsys):
    fails(capsys, flags(base, "/proc/self"), "output_dir /proc/self: cannot be written")
    if os.getuid():
        (tmp_path / "run").mkdir(mode=0o555)
        fails(capsys, flags(base, tmp_path / "run"), tmp_path / "run", "cannot be written (Permission denied)")


def test_a_run_is_resumed_as_it_began(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(base, out, steps=2)) == 0
    fails(capsys, [*flags(base, out, steps=2, lr=1e-4), "--resume"], "its run has lr 0.01 (not 0.0001)", "--config")
    other = flags(base, out, steps=2, seed=3, batch_size=8)
    fails(capsys, [*other, "--resume"], "batch_size 4 (not 8), seed 0 (not 3)")


def test_a_folder_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "folder"
    with whole_folder(path) as new:
        (new / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_folder(path) as new:
        (new / "a").write_text("2")
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"folder: cannot be written \(No space left on device\)"):
        with whole_folder(path) as new:
            (new / "a").write_text("2")
            raise OSError(28, os.strerror(28))
    assert (path / "a").read_text() == "1" and [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    with whole_folder(path) as new:
        (new / "b").write_text("3")
    assert [entry.name for entry in path.iterdir()] == ["b"]


def flip(path, at):
    """Change a bit of the byte at that place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damages(checkpoint):
    """Ways in which a checkpoint was left half written by something else, or has changed since."""
    yield lambda: flip(checkpoint / "model.safetensors", -1)
    yield lambda: flip(checkpoint / "optimizer.pt", 200)
    yield lambda: (checkpoint / "trainer_state.json").unlink()
    yield lambda: (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:-200])
    yield lambda: (checkpoint / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-9])
    yield lambda: (checkpoint / "model.safetensors").unlink()
    yield lambda: (checkpoint / "trainer_state.json").write_text('{"global_step": ')
    yield lambda: [path.unlink() for path in checkpoint.glob("rng_state*")]


def test_a_checkpoint_that_is_not_whole_is_passed_over(base, tmp_path, caplog):
    """The older one is taken, and the run ends at the same weights."""
    out, lr = tmp_path / "part", 1e-2

    def stop(trainer, *args, step=TaskTrainer.training_step, **kwargs):
        if trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *args, **kwargs)

    argv = no_journal(base, out, lr=lr, eval_steps=2)
    child = start(argv, tmp_path / "log", lambda: setattr(TaskTrainer, "training_step", stop))
    assert wait(child) == -signal.SIGKILL
    *_, older, newest = checkpoints(out)
    assert (older.name, newest.name) == ("checkpoint-2", "checkpoint-4") and is_whole(older) and is_whole(newest)
    for number, damage in enumerate(damages(newest)):
        kept = shutil.copytree(newest, tmp_path / f"kept{number}")
        damage()
        assert not is_whole(newest)
        with RunFolder(out, resume=True) as folder:
            assert folder.last_checkpoint() == str(older)
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    (newest / "trainer_state.json").unlink()
    assert main([*argv, "--resume"]) == 0
    assert "checkpoint-4 is not whole" in caplog.text
    assert json.loads((out / "result.json").read_text())["steps"] == 6


def small_files():
    """No file may grow beyond 40,000 bytes: the model takes more, rows and settings less."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_while_saving_is_one_line_and_the_last_checkpoint_stays(base, tmp_path):
    out = tmp_path / "run"

    def later(trainer, *args, save=TaskTrainer._save_checkpoint, **kwargs):
        if trainer.state.global_step > 3:
            small_files()
        return save(trainer, *args, **kwargs)

    child = start(no_journal(base, out), tmp_path / "log", lambda: setattr(TaskTrainer, "_save_checkpoint", later))
    assert wait(child) == 2
    _, error = child.text.split("zo: error: ")
    assert "checkpoint-6: cannot be written" in error.splitlines()[0] and "File too large" in error.splitlines()[0]
    assert "Traceback" not in child.text
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"] and is_whole(out / "checkpoint-3")
    assert not [path for path in out.iterdir() if "unfinished" in path.name or path.name.endswith(".tmp")]
    assert main([*no_journal(base, out), "--resume"]) == 0
    assert main(no_journal(base, tmp_path / "whole")) == 0
    assert same_weights(out, tmp_path / "whole")


def test_a_full_disk_from_the_start(base, tmp_path):
    limit = resource.RLIMIT_FSIZE, (0, 0)
    child = start(flags(base, tmp_path / "run"), Path("/dev/null"), lambda: resource.setrlimit(*limit))
    assert wait(child) == 2


def at_step(number, act):
    """A training step that does something before its first evaluation."""
    def step(trainer, *args, original=TaskTrainer.training_step, **kwargs):
        if trainer.state.global_step == number:
            act()
        return original(trainer, *args, **kwargs)

    return step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kept", ["journal", "checkpoint"])
def test_a_signal_finishes_the_step_and_keeps_it(base, tmp_path, monkeypatch, capsys, number, kept):
    out, more = tmp_path / "run", [] if kept == "journal" else ["--no-journal"]
    assert main([*flags(base, tmp_path / "whole", steps=5), *more]) == 0
    before = signal.getsignal(number)
    monkeypatch.setattr(TaskTrainer, "training_step", at_step(1, lambda: os.kill(os.getpid(), number)))
    capsys.readouterr()
    assert main([*flags(base, out, steps=5), *more]) == 130
    told = capsys.readouterr().err
    assert "stopping after this step; once more stops at once" in told
    assert f"interrupted; step 2 is kept ({kept}), go on with: zo train --config {out / 'config.yaml'} --resume" in told
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"] * bool(more)
    assert not (out / "result.json").exists() and signal.getsignal(number) is before
    monkeypatch.undo()
    assert main(["train", "--config", str(out / "config.yaml"), "--resume"]) == 0
    assert same_weights(out, tmp_path / "whole") and result(out)["steps"] == 5


def test_twice_stops_at_once(base, tmp_path, monkeypatch):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TaskTrainer, "training_step", at_step(1, twice))
    assert main(flags(base, tmp_path / "run", steps=5)) == 130
    assert not checkpoints(tmp_path / "run")


def test_an_interruption_of_a_run_that_keeps_nothing_says_so(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TaskTrainer, "training_step", at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert main([*flags(base, tmp_path / "run", steps=5), "--no-checkpoints", "--no-journal"]) == 130
    assert "interrupted after step 2; nothing was kept (--no-checkpoints, --no-journal)" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--no-journal",)])
def test_a_finished_run_is_resumed_to_the_same_end(base, tmp_path, more):
    """Killed between the last step and the result: no other step is taken."""
    out = tmp_path / "run"
    assert main([*flags(base, out), *more]) == 0
    first = load_file(out / "model" / "model.safetensors")
    (out / "result.json").unlink()
    assert main([*flags(base, out), "--resume", *more]) == 0
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first) and result(out)["steps"] == 6


def test_a_full_disk_while_the_journal_is_written(base, tmp_path):
    """A step that is not in the journal ends the run with a line, and is taken again."""
    out = tmp_path / "run"

    def full(trainer, *args, step=TaskTrainer.training_step, **kwargs):
        if trainer.state.global_step == 4:
            size = (out / "journal.zoj").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        return step(trainer, *args, **kwargs)

    child = start(flags(base, out), tmp_path / "log", lambda: setattr(TaskTrainer, "training_step", full))
    assert wait(child) == 2
    _, error = child.text.split("zo: error: ")
    assert "journal.zoj: the journal cannot be written (File too large)" in error.splitlines()[0]
    journal = read_journal(out / "journal.zoj")
    assert journal.steps == 4 and journal.cut == 20
    assert main([*flags(base, out), "--resume"]) == 0
    assert main(flags(base, tmp_path / "whole")) == 0
    assert same_weights(out, tmp_path / "whole")


def test_a_run_that_skips_too_much_ends_with_a_line(base, tmp_path, monkeypatch, capsys):
    nan = torch.tensor(torch.nan)
    monkeypatch.setattr(workload, "training_loss", lambda model, batch: (nan, torch.ones(())))
    capsys.readouterr()
    assert main(no_journal(base, tmp_path / "run", steps=50, eval_steps=10)) == 2
    _, error = capsys.readouterr().err.split("zo: error: ")
    assert error.startswith("stopped before step 35: more than 50% of the last steps were skipped (35 in all")
    assert is_whole(checkpoints(tmp_path / "run")[-1])
