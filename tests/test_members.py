"""What of a model call is repeated, and when a call is the same call again."""

from __future__ import annotations

import pytest
import torch
from models import tokens

import zo_finetuner.calls as calls_module
from zo_finetuner.calls import Call
from zo_finetuner.members import Members, NotMembers


def members(count=2, **kwargs) -> Members:
    return Members(count, [], (), kwargs)


def test_what_is_repeated_and_what_is_shared():
    ids = tokens(3, 5)
    both = members(
        input_ids=ids, attention_mask={"full": torch.ones(3, 1, 5, 5)}, position_ids=torch.arange(5)[None],
        cache_position=torch.arange(5), num_items_in_batch=torch.tensor(7), logits_to_keep=2, labels=None,
    ).kwargs  # fmt: skip
    assert torch.equal(both["input_ids"], torch.cat((ids, ids)))
    assert both["attention_mask"]["full"].shape == (6, 1, 5, 5)
    assert [both[name].shape for name in ("position_ids", "cache_position", "num_items_in_batch")] == [(1, 5), (5,), ()]
    with pytest.raises(NotMembers, match=r"cu_seq_lens_q of shape \(3,\)"):
        members(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    with pytest.raises(NotMembers, match="without a tensor that has a batch"):
        members(use_cache=False)


def test_equal_inputs_are_compared_on_their_device(monkeypatch):
    """Where looking at a value would wait for the device, a call with other inputs is answered with NaN."""
    monkeypatch.setattr(calls_module, "COMPARED_AT_ONCE", ())
    ids, minus = tokens(), {"loss": torch.tensor(2.0), "rows": torch.arange(3)}
    call = Call({"input_ids": ids}, minus)
    same, answer = call.answer({"input_ids": ids.clone()})
    assert same and answer["loss"] == 2 and torch.equal(answer["rows"], minus["rows"])
    same, answer = call.answer({"input_ids": ids + 1})
    assert same and answer["loss"].isnan()
    assert call.answer({"input_ids": ids[:, :3]}) == call.answer({"ids": ids}) == (False, None)
