"""The journal's file: what is written is read, what is torn is cut, what is damaged is named."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from models import save_model, save_rows, tiny
from test_replay import assert_same, loss_of, run, snapshot

from zo_finetuner.config import RunConfig
from zo_finetuner.errors import InputError
from zo_finetuner.journal import FINITE, read_journal
from zo_finetuner.journal_writer import JournalWriter
from zo_finetuner.loading import load_model
from zo_finetuner.optim import MeZO
from zo_finetuner.optimizer import ZOOptimizer, create_zo_optimizer
from zo_finetuner.recorder import IN_FLIGHT, Recorder
from zo_finetuner.replay import replay
from zo_finetuner.training import train


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(bytes of a journal of MeZO in place with decay, the journal)."""
    path = tmp_path_factory.mktemp("journal") / "j.zoj"
    run(path, weight_decay=0.1, steps=5)
    return path.read_bytes(), read_journal(path)


def test_a_step_of_mezo_takes_no_more_than_64_bytes(written, tmp_path):
    assert written[1].header.record.size == 44  # in place, with decay: the longest
    run(tmp_path / "scratch.zoj", dtype=torch.bfloat16, steps=1)
    assert read_journal(tmp_path / "scratch.zoj").header.record.size == 32


def test_learned_scales_take_2_bytes_a_block(tmp_path):
    run(tmp_path / "mezo.zoj", dtype=torch.bfloat16, steps=1)
    _, _, optimizer = run(tmp_path / "learned.zoj", "zo-finetuner", torch.bfloat16, steps=2)
    mezo, learned = (read_journal(tmp_path / f"{name}.zoj") for name in ("mezo", "learned"))
    blocks = len(optimizer.engine.blocks)
    assert learned.header.record.size == mezo.header.record.size + 2 * blocks
    last = torch.from_numpy(learned.records["scales"][-1].astype(numpy.float32))
    policy = optimizer.engine.method.scales
    assert torch.equal(last.min(), policy.metrics["scale_min"]) and torch.equal(last.max(), policy.metrics["scale_max"])


def test_what_was_told_and_done_is_what_is_read(tmp_path):
    model, told = tiny("llama-tied", torch.bfloat16), []

    def watched(step):
        loss = loss_of(model, step)

        def closure():
            told.append(loss())
            return told[-1]

        return closure

    optimizer = create_zo_optimizer(model, "mezo", lr=1e-3, eps=1e-2, seed=2**64 - 1, journal=tmp_path / "j.zoj",
                                    weight_decay=0.5)  # fmt: skip
    g = []
    for step in range(3):
        optimizer.step(watched(step))
        g.append(optimizer.engine.projected_grad.clone())
    journal = read_journal(tmp_path / "j.zoj")  # no close: every record is in the file when its step ends
    assert journal.header.seed == 2**64 - 1 and journal.header.method["name"] == "mezo"
    assert torch.equal(torch.from_numpy(journal.records["losses"].copy()).flatten(), torch.stack(told).float())
    lr = torch.tensor(1e-3)
    assert torch.equal(torch.from_numpy(journal.records["coefs"].copy()).flatten(), -lr * torch.stack(g))
    assert set(journal.records["decay"].flatten()) == {numpy.float32(1 - lr * 0.5)}
    assert (journal.records["lr"] == numpy.float32(1e-3)).all() and (journal.records["flags"] == FINITE).all()


def test_a_torn_end_is_cut(written, tmp_path):
    content, journal = written
    size, path = journal.header.record.size, tmp_path / "j.zoj"
    for left in range(1, size):
        path.write_bytes(content[: len(content) - left])
        torn = read_journal(path)
        assert torn.steps == journal.steps - 1 and torn.cut == size - left
    path.write_bytes(content + bytes(3 * size + 1))  # blocks that the disk had promised and not filled
    assert read_journal(path).steps == journal.steps


def test_a_changed_byte_is_named_wherever_it_is(written, tmp_path):
    content, journal = written
    size, path = journal.header.record.size, tmp_path / "j.zoj"
    for byte in range(0, len(content) - size, 7):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 0x10]) + content[byte + 1 :])
        record = (byte - journal.start) // size
        where = "j.zoj: " if byte < journal.start else rf"record {record} \(byte {journal.start + record * size}\)"
        with pytest.raises(InputError, match=where):
            read_journal(path)


def test_a_missing_record_is_named(written, tmp_path):
    content, journal = written
    size, start = journal.header.record.size, journal.start
    (tmp_path / "j.zoj").write_bytes(content[: start + size] + content[start + 2 * size :])
    with pytest.raises(InputError, match="record 1 .* is of step 2, not of step 1"):
        read_journal(tmp_path / "j.zoj")


@pytest.mark.parametrize("content", [b"", b"ZOJOURNL", b"ZOJOURNL\1\0\0\0\xff\xff\xff\x7f", b"PK\3\4" * 20])
def test_what_is_no_journal_is_refused(content, tmp_path):
    (tmp_path / "j.zoj").write_bytes(content)
    with pytest.raises(InputError, match=r"j\.zoj: "):
        read_journal(tmp_path / "j.zoj")
    with pytest.raises(InputError, match="is a folder; give a regular file"):
        read_journal(tmp_path)


def test_a_journal_is_not_written_over(written, tmp_path):
    content, _ = written
    (tmp_path / "j.zoj").write_bytes(content)
    model = tiny("llama-tied")
    with pytest.raises(InputError, match="is there already"):
        ZOOptimizer(model, MeZO(), journal=tmp_path / "j.zoj").step(loss_of(model, 0))
    with pytest.raises(InputError, match="there is no folder"):
        Recorder(tmp_path / "none" / "j.zoj")
    assert (tmp_path / "j.zoj").read_bytes() == content


def test_going_on_at_a_step_gives_the_journal_of_an_unbroken_run(tmp_path):
    _, weights, _ = run(tmp_path / "whole.zoj", "zo-adam", steps=6)
    _, _, first = run(tmp_path / "j.zoj", "zo-adam", steps=4)
    with (tmp_path / "j.zoj").open("ab") as stream:
        stream.write(b"torn")
    model = first.engine.model
    second = create_zo_optimizer(model, "zo-adam", lr=1e-3, eps=1e-2, seed=5, journal=tmp_path / "j.zoj")
    second.load_state_dict(first.state_dict())
    for step in (4, 5):
        second.param_groups[0]["lr"] = 1e-3 / (1 + step)
        second.step(loss_of(model, step))
    second.close()
    assert_same(model, weights[6])
    assert (tmp_path / "j.zoj").read_bytes() == (tmp_path / "whole.zoj").read_bytes()
    with pytest.raises(InputError, match="holds steps 0 to 6, not 7"):
        JournalWriter.reopen(tmp_path / "j.zoj", 7)


def test_a_skipped_step_is_journalled_and_changes_nothing(tmp_path):
    model = tiny("llama-tied", torch.bfloat16)
    optimizer = create_zo_optimizer(model, "mezo", lr=1e-3, eps=1e-2, journal=tmp_path / "j.zoj", weight_decay=0.5)
    before = snapshot(model)
    optimizer.step(lambda: torch.tensor(torch.nan))
    assert_same(model, before)
    records = read_journal(tmp_path / "j.zoj").records
    assert records["flags"][0] == 0 and records["coefs"][0] == 0 and records["decay"][0] == 1


def test_zo_train_keeps_a_journal_and_its_base_gives_the_weights(tmp_path):
    model, data, out = save_model(tmp_path / "base"), save_rows(tmp_path / "rows"), tmp_path / "run"
    config = RunConfig(model=str(model), task="sst2", data=str(data), output_dir=str(out), steps=4, batch_size=4,
                       num_train=32, num_dev=8, num_eval=8, lr=1e-3, checkpoints=False)  # fmt: skip
    train(config)
    base, _ = load_model(str(model))
    journal = read_journal(out / "journal.zoj")
    assert replay(base, journal) == 4 and journal.header.run["config"]["task"] == "sst2"
    assert_same(base, load_model(str(out / "model"))[0].state_dict())
    train(dataclasses.replace(config, journal=False, overwrite=True))
    assert not (out / "journal.zoj").exists()


class Late:
    """The event of a copy that has not arrived before somebody waits for it."""

    def __init__(self, row, content):
        self.row, self.content, self.done = row, content, False

    def query(self):
        return self.done

    def synchronize(self):
        self.row.copy_(self.content)
        self.done = True


def test_rows_that_arrive_late_are_written_whole_and_in_order(tmp_path):
    model = tiny("llama-tied", torch.bfloat16)
    early, late = (Recorder(tmp_path / name) for name in ("early", "late"))
    optimizer = ZOOptimizer(model, MeZO(), lr=1e-3, eps=1e-2, journal=early)
    late.before(optimizer.engine)
    sent = []
    for step in range(IN_FLIGHT + 3):
        optimizer.step(lambda told=1.0 + step: torch.tensor(told))
        if late._writer is None:
            late._row = early._row
            optimizer.engine.step_count = 0
            late._open(optimizer.engine)
            optimizer.engine.step_count = 1
        row = torch.zeros_like(early._row.bytes)
        sent.append(Late(row, early._row.bytes.clone()))
        late.expect(step, 0, row, sent[-1])
        assert sum(event.done for event in sent) == max(0, step + 1 - IN_FLIGHT)  # nobody waits before it must
    late.close()
    early.close()
    assert (tmp_path / "late").read_bytes() == (tmp_path / "early").read_bytes()
