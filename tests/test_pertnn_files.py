"""Files of learned optimizers: nothing is executed, damage ends in one line, what is saved comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch_files import (
    LABELS,
    NAMES,
    PUBLISHED,
    network,
    refused,
    torch_file,
)

from zo_finetuner import pertnn_io
from zo_finetuner.errors import InputError
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import METADATA_KEY, Card, load_pertnn, save_pertnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reads_what_torch_save_writes(tmp_path, dtype):
    networks = {name: network().to(dtype) for name in NAMES}
    nets, card = load_pertnn(torch_file(tmp_path / "nets.pth", networks))
    assert nets.names == card.names == NAMES and card.hidden == 64 and card.recipe == "paper"
    assert card.source == "published file nets.pth ('nets')" and card.noise_contract == 0
    for i, net in enumerate(networks.values()):
        for ours, theirs in (
            (nets.w1[i], net[0].weight),
            (nets.b1[i], net[0].bias),
            (nets.w2[i], net[2].weight[0]),
            (nets.b2[i], net[2].bias[0]),
        ):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_file_to_safetensors_bit_for_bit(shared, tmp_path, file):
    """Against torch's own restricted loader, and once more through our format."""
    path = shared / "pertnn" / f"{file}_finetuner.pth"
    nets, card = load_pertnn(path)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh, set]):
        expected = torch.load(path, map_location="cpu", weights_only=True)
    assert nets.names == tuple(expected)
    for label, place in (("w1", "0.weight"), ("b1", "0.bias"), ("w2", "2.weight"), ("b2", "2.bias")):
        stacked = torch.stack([net.state_dict()[place] for net in expected.values()]).float()
        assert torch.equal(getattr(nets, label), stacked.reshape(getattr(nets, label).shape))
    save_pertnn(tmp_path / "nets.safetensors", nets, card)
    again, card_again = load_pertnn(tmp_path / "nets.safetensors")
    assert card_again == card and again.names == nets.names
    assert all(torch.equal(getattr(again, label), getattr(nets, label)) for label in LABELS)


# --- hostile pickles ------------------------------------------------------------------------------


def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: {NAMES[0]: network(inputs=3)}, r"tokens.weight is \(Linear\(3, 64\), Tanh, Linear\(64, 1\)"),
        (lambda: {NAMES[0]: nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 2))}, r"Linear\(64, 2\)\)"),
        (lambda: {NAMES[0]: nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(32, 1))}, r"Linear\(32, 1\)\)"),
        (lambda: {NAMES[0]: nn.Sequential(*network(), nn.Tanh())}, r"Linear\(64, 1\), Tanh\); a PertNN is"),
        (lambda: {NAMES[0]: nn.Sequential(nn.Linear(5, 1))}, r"is \(Linear\(5, 1\)\); a PertNN"),
        (lambda: {NAMES[0]: nn.Sequential()}, r"is \(\); a PertNN"),
        (lambda: {NAMES[0]: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 9), nn.Linear(9, 1))}, r"Linear\(6, 9\)"),
        (lambda: {NAMES[0]: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1))}, "bias None"),
        (lambda: {NAMES[0]: nn.Linear(5, 1)}, "is a Linear, not a Sequential"),
        (lambda: {NAMES[0]: torch.zeros(3)}, r"is a tensor of shape \(3,\), not a Sequential"),
        (lambda: {NAMES[0]: relu()}, "'torch.nn.modules.activation.ReLU', and only Linear, Tanh and Sequential"),
        (lambda: {NAMES[0]: network().double()}, "'torch.DoubleStorage'"),
        (lambda: network().state_dict(), "a BUILD of a dict"),
        (lambda: network(), "holds a Sequential, not a dictionary"),
        (dict, "holds a dict, not a dictionary of networks"),
        (lambda: {NAMES[0]: network(), NAMES[1]: network(hidden=32)}, "q_proj.weight has 32 hidden units, the"),
        (lambda: {"a\nb": network()}, r"'a\\nb' is no name"),
        (lambda: {"": network()}, "'' is no name"),
    ],
)
def test_other_architectures_are_refused_by_what_was_found(tmp_path, make, match):
    refused(torch_file(tmp_path / "nets.pth", make()), match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_non_finite_weights_are_refused_by_name(tmp_path, value, place):
    networks = {name: network() for name in NAMES}
    networks[NAMES[1]].state_dict()[place].view(-1)[0] = value
    refused(
        torch_file(tmp_path / "nets.pth", networks),
        r"weights in the network of model.layers.0.q_proj.weight \(1 of 3 networks\)",
    )


# --- safetensors ----------------------------------------------------------------------------------

CARD = Card(
    source="fresh, seed 3",
    base_model="a/b",
    base_fingerprint="shapes:0123456789abcdef weights:0123456789abcdef",
    tasks=("sst2", "copa"),
    metrics={"loss": 0.1, "note": "größer", "steps": 20},
)


def saved(tmp_path: Path, card: Card = CARD) -> tuple[Path, PertNN]:
    nets = PertNN.fresh(NAMES, seed=3)
    save_pertnn(tmp_path / "nets.safetensors", nets, card)
    return tmp_path / "nets.safetensors", nets


def rewritten(path: Path, *, tensors: dict | None = None, **changes) -> Path:
    """The file at `path`, with some keys of its card and some tensors changed (None takes a key away)."""
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()[METADATA_KEY]) | changes
        content = {label: file.get_tensor(label).clone() for label in LABELS} | (tensors or {})
    metadata = {METADATA_KEY: json.dumps({key: value for key, value in card.items() if value is not None})}
    save_file(content, path, metadata=metadata)
    return path


def test_round_trip_and_readable_card(tmp_path):
    path, nets = saved(tmp_path)
    again, card = load_pertnn(str(path))
    assert all(torch.equal(getattr(again, label), getattr(nets, label)) for label in LABELS)
    assert again.names == card.names == NAMES and again.source == str(path)
    assert card == replace(CARD, names=NAMES)
    with safe_open(path, "pt") as file:
        written = json.loads(file.metadata()[METADATA_KEY])
    assert written["format_version"] == 1 and written["names"] == list(NAMES) and written["hidden"] == 64
    assert written["inputs"][0] == "mean" and written["noise_contract"] == 1
    assert written["metrics"] == {"loss": 0.1, "note": "größer", "steps": 20}
    first = path.read_bytes()
    save_pertnn(path, again, card)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["nets.safetensors"]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"format_version": 2}, '"format_version" 2 in the card, this release reads 1; update'),
        ({"format_version": 0}, '"format_version" 0'),
        ({"format_version": None}, 'no whole number "format_version"'),
        ({"format_version": True}, 'no whole number "format_version"'),
        ({"recipee": "paper"}, r"unknown key 'recipee' in the card \(did you mean .recipe.\?\)"),
        ({"recipe": "improve"}, r"recipe 'improve' \(did you mean .improved.\?\); this release runs paper, improved"),
        ({"recipe": "improved"}, "its networks read .'mean', .*those of this release .'log numel'"),
        ({"sigma": [1.0]}, '"sigma" in the card has 1 numbers for 3 blocks'),
        ({"sigma": [1.0, 2.0, "3"]}, '"sigma" in the card is not of type'),
        ({"curve": [float("inf")]}, "the card: Infinity is no number of JSON"),
        ({"curve": [10**400]}, '"curve" in the card is not of type'),
        ({"inputs": ["mean"]}, r"its networks read \['mean'\]"),
        ({"hidden": "64"}, '"hidden" in the card is not of type int'),
        ({"hidden": 63}, "its card asks for"),
        ({"names": [1, 2, 3]}, '"names" in the card is not of type'),
        ({"names": list(NAMES[:2])}, "its card asks for"),
        ({"names": [NAMES[0], NAMES[1], NAMES[0]]}, "two networks are named model.embed_tokens.weight"),
        ({"names": ["a", "b", "c\nd"]}, '"names" in the card is no text in one line'),
        ({"names": None}, 'the card has no "names"'),
        ({"metrics": {"loss": float("nan")}}, "the card: NaN is no number of JSON"),
        ({"metrics": {"loss": [1]}}, '"metrics" in the card'),
        ({"tensors": {"w1": torch.zeros(3, 64, 6)}}, "its card asks for"),
        ({"tensors": {"b2": torch.zeros(3, dtype=torch.float16)}}, "F16"),
        ({"tensors": {"w3": torch.zeros(3)}}, "w3"),
        ({"tensors": {"b2": torch.tensor([0.0, float("nan"), 1.0])}}, "network of model.layers.0.q_proj.weight"),
        (
            {
                "names": [],
                "tensors": {
                    "w1": torch.zeros(0, 64, 5),
                    "b1": torch.zeros(0, 64),
                    "w2": torch.zeros(0, 64),
                    "b2": torch.zeros(0),
                },
            },
            "0 networks of 64",
        ),
    ],
)
def test_cards_and_tensors_that_do_not_fit_are_refused(tmp_path, changes, match):
    path, _ = saved(tmp_path)
    refused(rewritten(path, **changes), match)


@pytest.mark.parametrize(
    "card", ["", "[]", "{}", "{", "null", "[" * 100_000, '{"format_version": ' + "9" * 9999 + "}", " " * 5_000_000]
)
def test_cards_that_are_no_card(tmp_path, card):
    path = tmp_path / "nets.safetensors"
    save_file({"w1": torch.zeros(1)}, path, metadata={METADATA_KEY: card})
    refused(path, "the card(: not JSON|: lists and objects lie| has no whole number| has 5000000 characters)")


def test_safetensors_without_card_or_cut(tmp_path):
    path, _ = saved(tmp_path)
    whole = path.read_bytes()
    for size in (9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "truncated|holds .* bytes of tensors but its header needs")
    save_file({"w1": torch.zeros(1)}, path)
    refused(path, 'no card .metadata "zo_finetuner.pertnn".: not a learned optimizer')
    with path.open("r+b") as stream:
        stream.truncate(2**30)
    refused(path, "has 1,073,741,824 bytes; at most")


@pytest.mark.parametrize(
    "function, error, raised",
    [
        ("replace", OSError(28, "No space left on device"), InputError),
        ("fsync", OSError(5, "I/O error"), InputError),
        ("fsync", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error, raised):
    path, _ = saved(tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(pertnn_io.os, function, fail)
    with pytest.raises(raised):
        save_pertnn(path, PertNN.fresh(NAMES, seed=9), CARD)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["nets.safetensors"]


@pytest.mark.parametrize(
    "name, card, change, match",
    [
        ("nets.pth", CARD, None, "is saved as .safetensors"),
        ("missing/nets.safetensors", CARD, None, "there is no folder"),
        ("nets.safetensors", Card(source="x", metrics={"loss": float("nan")}), None, "the card is no JSON"),
        ("nets.safetensors", Card(source="x", metrics={"loss": torch.ones(1)}), None, "the card is no JSON"),
        ("nets.safetensors", Card(source="x", recipe="papers"), None, r"recipe 'papers' \(did you mean .paper."),
        ("nets.safetensors", Card(source="x" * (1 << 23)), None, "the card has 8"),
        ("nets.safetensors", Card(source="x", format_version=2), None, '"format_version" 2'),
        ("nets.safetensors", CARD, float("nan"), "NaN or infinite weights in the network of model.norm.weight"),
    ],
)
def test_save_refuses_what_could_not_be_loaded(tmp_path, name, card, change, match):
    nets = PertNN.fresh(NAMES)
    if change is not None:
        with torch.no_grad():
            nets.w2[2, 5] = change
    with pytest.raises(InputError, match=match) as caught:
        save_pertnn(tmp_path / name, nets, card)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and list(tmp_path.iterdir()) == []


def test_save_refuses_a_file_too_large_to_be_read(tmp_path, monkeypatch):
    path, nets = saved(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(pertnn_io, "_MAX_BYTES", len(before))
    load_pertnn(path)
    with pytest.raises(InputError, match="are read back"):
        save_pertnn(path, nets, replace(CARD, base_model="a longer name"))
    assert path.read_bytes() == before
