"""Files of learned optimizers: nothing is executed, damage ends in one line, what is saved comes back."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from zo_finetuner import pertnn_io, restricted_pickle
from zo_finetuner.errors import InputError
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import METADATA_KEY, Card, load_pertnn, save_pertnn

NAMES = ("model.embed_tokens.weight", "model.layers.0.q_proj.weight", "model.norm.weight")
PUBLISHED = ("llama1B", "llama8B", "opt30B", "qwen14B")
LABELS = ("w1", "b1", "w2", "b2")


def refused(path: Path, match: str) -> None:
    """Loading ends in one InputError line that names the file."""
    with pytest.raises(InputError, match=match) as caught:
        load_pertnn(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def network(*, inputs: int = 5, hidden: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def torch_zip(path: Path, data: bytes, *, storages: dict[str, bytes] | None = None,
              byteorder: bytes = b"little", compression: int = zipfile.ZIP_STORED) -> Path:
    """A file laid out as torch.save does, with any bytes as its pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("nets/data.pkl", data)
        archive.writestr("nets/byteorder", byteorder)
        for key, content in (storages or {}).items():
            archive.writestr(f"nets/data/{key}", content)
    return path


# Pickle by hand.
def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def word(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def storage(key: str, numel: bytes, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), word("torch", kind), text(key), text("cpu"), numel) + b"Q"


def view(source: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes, strides = tuple_of(*map(integer, shape)), tuple_of(*map(integer, stride))
    arguments = tuple_of(source, integer(offset), sizes, strides, b"\x89", ORDERED_DICT + b")R")
    return word("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


FLOAT, LINEAR = word("torch", "FloatStorage"), word("torch.nn.modules.linear", "Linear")
ORDERED_DICT = word("collections", "OrderedDict")


def program(body: bytes, *, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# --- what is published, and what torch writes -----------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reads_what_torch_save_writes(tmp_path, dtype):
    networks = {name: network().to(dtype) for name in NAMES}
    nets, card = load_pertnn(torch_file(tmp_path / "nets.pth", networks))
    assert nets.names == card.names == NAMES and card.hidden == 64 and card.recipe == "paper"
    assert card.source == "published file nets.pth ('nets')" and card.noise_contract == 0
    for i, net in enumerate(networks.values()):
        for ours, theirs in ((nets.w1[i], net[0].weight), (nets.b1[i], net[0].bias),
                             (nets.w2[i], net[2].weight[0]), (nets.b2[i], net[2].bias[0])):
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

def attacks(command: str) -> dict[str, bytes]:
    """Programs that run `command` when Python unpickles them."""
    python, call = f"__import__('os').system({command!r})", text(command) + b"\x85R"
    return {
        "REDUCE os.system": program(word("os", "system") + call),
        "REDUCE posix.system": program(word("posix", "system") + call),
        "builtins.eval": program(word("__builtin__", "eval") + text(python) + b"\x85R"),
        "builtins.exec": program(word("builtins", "exec") + text(python) + b"\x85R", protocol=3),
        "STACK_GLOBAL": program(text("os") + text("system") + b"\x93" + call, protocol=4),
        "STACK_GLOBAL in protocol 2": program(text("os") + text("system") + b"\x93" + call),
        "INST": program(b"(" + text(command) + b"ios\nsystem\n"),
        "OBJ": program(b"(" + word("os", "system") + text(command) + b"o"),
        "EXT1": program(b"\x82\xf0" + call),
        "EXT4": program(b"\x84\xf0\x00\x00\x00" + call),
        "dotted global": program(text("os") + text("path.os.system") + b"\x93" + call, protocol=4),
        "call through functools": program(
            word("functools", "partial") + tuple_of(word("os", "system"), text(command)) + b"R)R"),
        "__setstate__ by BUILD": program(
            word("collections", "Counter") + b")R}" + text("__setstate__") + word("os", "system") + b"sb"
            + text(command) + b"b"),
        "__reduce__ in a key": program(b"}" + word("os", "system") + call + b"Ns"),
        "no protocol": word("os", "system") + call + b".",
    }


@pytest.mark.parametrize("name", attacks(""))
def test_hostile_pickle_is_refused_and_not_executed(tmp_path, name):
    sentinel = tmp_path / "executed"
    data = attacks(f"touch {sentinel}")[name]
    copyreg.add_extension("os", "system", 0xF0)
    try:
        pickle.loads(data)  # the attack is live: Python runs it (and keeps the extension in a cache now)
        assert sentinel.exists()
        sentinel.unlink()
        refused(torch_zip(tmp_path / "nets.pth", data), "nothing was executed")
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not sentinel.exists()


class Runs:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("hide", ["key", "value", "attribute", "hook"])
def test_hostile_object_inside_a_real_file_is_named(tmp_path, hide):
    sentinel = tmp_path / "executed"
    runs, networks = Runs(f"touch {sentinel}"), {name: network() for name in NAMES}
    if hide == "key":
        networks[runs] = network()
    elif hide == "value":
        networks[NAMES[1]] = runs
    elif hide == "attribute":
        networks[NAMES[1]][1].note = runs
    else:
        networks[NAMES[2]][0].register_forward_hook(os.system)
    path = torch_file(tmp_path / "nets.pth", networks)
    refused(path, r"it asks for 'posix\.system', and only .* nothing was executed")
    assert not sentinel.exists()


@pytest.mark.parametrize("name", [
    "torch.load", "torch.nn.modules.activation.ReLU", "torch.storage._load_from_bytes",
    "torch._utils._rebuild_tensor", "torch.nn.modules.linear.Linear.forward", "torch.DoubleStorage",
    "torch.hub.load", "numpy.load", "builtins.getattr"])
def test_a_global_is_refused_by_name(tmp_path, name):
    """Also without a call, and also as a walk from an allowed name."""
    module, _, attribute = name.rpartition(".")
    refused(torch_zip(tmp_path / "nets.pth", program(word(module, attribute))), f"asks for '{name}'")
    if name.startswith("torch.nn.modules.linear"):
        walk = word("torch.nn.modules.linear", "Linear.forward")
        refused(torch_zip(tmp_path / "nets.pth", program(walk)), f"asks for '{name}'")


@pytest.mark.parametrize("body, match", [
    (LINEAR + b"}b", "a BUILD of torch.nn.modules.linear.Linear"),
    (LINEAR + b")\x81}b}b", "a BUILD of a Linear from a dict"),
    (LINEAR + b")\x81N}" + text("__class__") + LINEAR + b"s\x86b", "a BUILD of a Linear from a tuple"),
    (LINEAR + b")\x81" + LINEAR + b"b", "a BUILD of a Linear from torch.nn"),
    (ORDERED_DICT + b")R}b", "a BUILD of a dict"),
    (LINEAR + integer(5) + b"\x85\x81", "a new torch.nn.modules.linear.Linear from a tuple"),
    (ORDERED_DICT + b")\x81", "a new collections.OrderedDict"),
    (LINEAR + b")R", "a call of torch.nn.modules.linear.Linear"),
    (ORDERED_DICT + b"(NN\x86t\x85R", "a call of collections.OrderedDict"),
    (word("__builtin__", "set") + b"]R", "a call of __builtin__.set"),
    (word("__builtin__", "set") + b"(Nt\x85R", "a call of __builtin__.set"),
    (text("os.system") + b")R", "a call of 'os.system'"),
    (word("torch._utils", "_rebuild_parameter") + tuple_of(text("x"), b"\x88", b"}") + b"R", "a call of"),
    (b"}NNs", "dictionary key None is no string"),
    (b"}" + text("a") + b"Ns" + text("a") + b"Ns", "'a' is no string, or stands twice"),
    (b"]" + text("a") + b"Ns", "a list, which is no dictionary"),
    (b"}(" + text("a") + b"u", "a dict, which is no dictionary|items for a dict"),
    (b"NN", "left over"),
    (b"", "left over"),
])
def test_malformed_programs_are_refused(tmp_path, body, match):
    refused(torch_zip(tmp_path / "nets.pth", program(body)), match)


@pytest.mark.parametrize("data", [
    b"", b"\x80", b"\x80\x02", program(b"\x85"), program(b"R"), program(b"s"), program(b"u"), program(b"t"),
    program(b"b"), program(b"q\x00"), program(b"h\x07"), program(b"j\xff\xff\xff\xff"),
    b"\x80\x02X\xff\xff\xff\x7fa", b"\x80\x02X\x00", b"\x80\x02ctorch", program(b"X\x01\x00\x00\x00\xff"),
    program(b"N")[:-1], program(b"N") + b"N", program(b"\x96" + b"\xff" * 8), program(b"\x95" + b"\xff" * 8),
    program(b"\x8b\xff\xff\xff\x7f"), program(b"I" + b"9" * 9999 + b"\n"), program(b"0"), program(b"Q"),
    program(b"P../../x\n"), b"\xff" * 64])
def test_broken_bytes_are_refused(tmp_path, data):
    refused(torch_zip(tmp_path / "nets.pth", data), "refused, nothing was executed")


@pytest.mark.parametrize("body", [
    b"X\xff\xff\xff\x7fabc", b"X\x04\x00\x00\x00abc", b"ctorch", b"ctorch\nload", b"J\x00"])
def test_arguments_that_run_past_the_end_are_refused_there(tmp_path, body):
    refused(torch_zip(tmp_path / "nets.pth", b"\x80\x02" + body), r"damaged at byte \d of \d+; refused")


def test_depth_width_and_doubling_end_in_a_refusal(tmp_path, monkeypatch):
    """The first crashes Python's unpickler (C stack), the second hangs it (2^200 hashes)."""
    path = tmp_path / "nets.pth"
    refused(torch_zip(path, program(b"})" + b"\x85" * 400_000 + b"Ns")), "dictionary key a tuple is no")
    refused(torch_zip(path, program(b"})" + b"q\x00h\x00\x86" * 200 + b"Ns")), "dictionary key a tuple is no")
    refused(torch_zip(path, program(b")" + b"\x85" * 400_000)), "holds a tuple, not a dictionary")
    refused(torch_zip(path, program(b"}q\x00" + text("a") + b"h\x00s")), "network a is a dict")
    refused(torch_zip(path, program(b"}r\xff\xff\xff\xff")), "holds a dict, not a dictionary of networks")
    refused(torch_zip(path, program(b"N" * 40_000)), "more than 32768 values on the stack")
    monkeypatch.setattr(restricted_pickle, "MAX_OPCODES", 1000)
    refused(torch_zip(path, program(b"N" + b"q\x00" * 1001)), "more than 1000 opcodes")


# --- storages and views ---------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["../byteorder", "../../etc/passwd", "/etc/passwd", "0/../0", "", "0\n", "٣"])
def test_storage_keys_are_numbers_only(tmp_path, key):
    path = torch_zip(tmp_path / "nets.pth", program(storage(key, integer(1))), storages={key: bytes(4)})
    refused(path, "a storage .* nothing was executed")


@pytest.mark.parametrize("identity, match", [
    (text("storage"), "the persistent id 'storage' is no storage"),
    (tuple_of(text("module"), LINEAR, text("x.py"), text("import os")), "the persistent id a tuple"),
    (tuple_of(text("storage"), LINEAR, text("0"), text("cpu"), integer(1)), "a storage '0' of torch.nn"),
    (tuple_of(text("storage"), text("FloatStorage"), text("0"), text("cpu"), integer(1)), "'FloatStorage'"),
    (tuple_of(text("storage"), FLOAT, integer(0), text("cpu"), integer(1)), "a storage 0 of"),
    (tuple_of(text("storage"), FLOAT, text("0"), text("cpu"), integer(-1)), "with -1 elements"),
    (tuple_of(text("storage"), FLOAT, text("0"), text("cpu"), b"\x88"), "with True elements"),
    (tuple_of(text("storage"), FLOAT, text("0"), text("cpu"), integer(2**31 - 1)), "with 2147483647 "),
])
def test_malformed_persistent_ids_are_refused(tmp_path, identity, match):
    path = torch_zip(tmp_path / "nets.pth", program(identity + b"Q"), storages={"0": bytes(4)})
    refused(path, match + ".*nothing was executed")


def test_storages_that_lie_about_their_size(tmp_path):
    path, content = tmp_path / "nets.pth", {"0": bytes(1280)}
    longer = program(storage("0", integer(321)))
    refused(torch_zip(path, longer, storages=content), "data/0 has 1280 bytes, not 1284")
    half = program(storage("0", integer(320), "HalfStorage"))
    refused(torch_zip(path, half, storages=content), "data/0 has 1280 bytes, not 640")
    refused(torch_zip(path, program(storage("1", integer(320))), storages=content), "data/1 is missing")
    twice = storage("0", integer(4)) + storage("0", integer(8), "HalfStorage") + b"\x86"
    refused(torch_zip(path, program(twice), storages={"0": bytes(16)}), "storage 0 is claimed twice")


@pytest.mark.parametrize("offset, shape, stride", [
    (1, (64, 5), (5, 1)), (320, (1,), (1,)), (0, (65, 5), (5, 1)), (0, (64, 5), (6, 1)), (0, (0,), (1,)),
    (0, (2, 2), (319, 1)), (-1, (64, 5), (5, 1)), (0, (64, 5), (-5, 1)), (0, (-64, 5), (5, 1)),
    (0, (64, 5), (5,)), (0, (1000, 1000), (0, 0)), (2**31 - 1, (1,), (1,)), (0, (1,) * 5, (1,) * 5),
    (0, (2**24, 2**24), (2**24, 2**24))])
def test_views_outside_their_storage_are_refused(tmp_path, offset, shape, stride):
    body = view(storage("0", integer(320)), offset, shape, stride)
    path = torch_zip(tmp_path / "nets.pth", program(body), storages={"0": bytes(1280)})
    refused(path, "a tensor .* nothing was executed")


def test_views_inside_their_storage_are_read_right(tmp_path):
    """Bounds are exact: the last element may be the last one of the storage."""
    values = torch.arange(320, dtype=torch.float32)
    source = storage("0", integer(320))
    body = tuple_of(view(source, 10, (31, 10), (10, 1)), view(source, 319, (1,), (7,)))
    path = torch_zip(tmp_path / "nets.pth", program(body), storages={"0": values.numpy().tobytes()})
    (matrix, last), folder = restricted_pickle.read_torch_file(path)
    assert torch.equal(matrix, values[10:].reshape(31, 10)) and last.tolist() == [319.0] and folder == "nets"


def test_networks_that_share_one_storage_cannot_multiply_it(tmp_path, monkeypatch):
    net = network()
    path = torch_file(tmp_path / "nets.pth", dict.fromkeys(map(str, range(50)), net))
    assert len(load_pertnn(path)[0].names) == 50
    monkeypatch.setattr(pertnn_io, "_MAX_BYTES", 49 * 449 * 4)
    refused(path, "50 networks of 64 hidden units are too many")


# --- the zip around it ----------------------------------------------------------------------------

def test_other_files_and_damaged_zips(tmp_path, monkeypatch):
    path = tmp_path / "nets.pth"
    refused(path, "no such file")
    refused(tmp_path, "no such file")
    for content in (b"", b"hello, this is no zip", pickle.dumps({}), bytes(100)):
        path.write_bytes(content)
        refused(path, "neither a safetensors file nor a torch.save zip")
    torch.save({name: network() for name in NAMES}, path, _use_new_zipfile_serialization=False)
    refused(path, "neither a safetensors file nor a torch.save zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nets/weights.bin", b"x")
    refused(path, "0 entries <folder>/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program(b"}"))
        archive.writestr("b/data.pkl", program(b"}"))
    refused(path, "2 entries <folder>/data.pkl")
    refused(torch_zip(path, program(b"}"), byteorder=b"big"), "byte order 'big', only 'little' is read")
    refused(torch_zip(path, program(b"}" * 9999), compression=zipfile.ZIP_DEFLATED), "is compressed")
    refused(torch_zip(path, bytes(restricted_pickle.MAX_PICKLE + 1)), "data.pkl is .* larger than 8388608")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("nets/data.pkl", program(b"}"))
        archive.writestr("nets/data.pkl", program(b"N"))
    refused(path, "an entry stands twice")
    torch_zip(path, program(b"}"), storages={str(key): b"" for key in range(20)})
    monkeypatch.setattr(restricted_pickle, "MAX_ENTRIES", 20)
    refused(path, "or more than 20 do")
    with path.open("r+b") as stream:
        stream.truncate(restricted_pickle.MAX_FILE + 1)
    refused(path, "bytes; a learned optimizer has at most 16777216")


def test_other_pickle_protocols_are_refused(tmp_path):
    path = tmp_path / "nets.pth"
    torch.save({name: network() for name in NAMES}, path, pickle_protocol=4)
    refused(path, "data.pkl is no pickle of protocol 2, which torch.save writes")


def test_entries_inside_each_other_do_not_multiply(tmp_path, monkeypatch):
    """Six storages of 4 kB and more in a file of 5 kB, each around the next: 25 kB would come out of it."""
    blob, infos = bytes(4000), []
    for key in range(6):
        info = zipfile.ZipInfo(f"nets/data/{key:04}")
        info.file_size = info.compress_size = len(blob)
        info.CRC = zlib.crc32(blob)
        blob = info.FileHeader() + blob
        infos.append(info)
    path = torch_zip(tmp_path / "nets.pth", program(tuple_of(
        *(storage(info.filename[-4:], integer(info.file_size // 4)) for info in infos))))
    with zipfile.ZipFile(path, "a") as archive:
        for info in infos:  # the last is the outermost
            info.header_offset = archive.start_dir + len(blob) - len(info.FileHeader()) - info.file_size
        archive.fp.seek(archive.start_dir)
        archive.fp.write(blob)
        archive.start_dir = archive.fp.tell()
        archive.filelist += infos
        archive.writestr("nets/version", b"3")
    refused(path, "holds a tuple|Overlapped entries")  # newer Pythons see the overlap by themselves
    monkeypatch.setattr(restricted_pickle, "MAX_FILE", 4 * 5000)
    refused(path, "entry data/0004 is compressed, or larger than|Overlapped entries")


def test_encrypted_entry_is_refused(tmp_path):
    path = torch_zip(tmp_path / "nets.pth", program(b"}"))
    raw = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := raw.find(signature, place + 1)) >= 0:
            raw[place + flags] |= 1
    path.write_bytes(raw)
    refused(path, "not a readable torch.save zip .*encrypted")


def test_any_cut_is_refused(tmp_path):
    whole = torch_file(tmp_path / "whole.pth", {name: network() for name in NAMES}).read_bytes()
    path = tmp_path / "nets.pth"
    for size in range(1, len(whole), 97):
        path.write_bytes(whole[:size])
        refused(path, "neither a safetensors file|not a readable torch.save zip")


def test_fuzzed_pickles_load_or_are_refused(tmp_path):
    """400 pickles with 1 to 4 random bytes each end in no other way. Some changes are harmless (a flag)."""
    source = torch_file(tmp_path / "whole.pth", {name: network(hidden=4) for name in NAMES[:2]})
    with zipfile.ZipFile(source) as archive:
        data = archive.read("whole/data.pkl")
        storages = {str(key): archive.read(f"whole/data/{key}") for key in range(8)}
    path, generator, outcomes = tmp_path / "nets.pth", random.Random(0), []
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        torch_zip(path, bytes(changed), storages=storages)
        try:
            load_pertnn(path)
            outcomes.append("loaded")
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes.append("refused")
    assert outcomes.count("refused") > 200 and outcomes.count("loaded") > 5


# --- other networks -------------------------------------------------------------------------------

def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))


@pytest.mark.parametrize("make, match", [
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
])
def test_other_architectures_are_refused_by_what_was_found(tmp_path, make, match):
    refused(torch_file(tmp_path / "nets.pth", make()), match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_non_finite_weights_are_refused_by_name(tmp_path, value, place):
    networks = {name: network() for name in NAMES}
    networks[NAMES[1]].state_dict()[place].view(-1)[0] = value
    refused(torch_file(tmp_path / "nets.pth", networks),
            r"weights in the network of model.layers.0.q_proj.weight \(1 of 3 networks\)")


# --- safetensors ----------------------------------------------------------------------------------

CARD = Card(source="fresh, seed 3", base_model="a/b", base_fingerprint="blake2s:00", tasks=("sst2", "copa"),
            metrics={"loss": 0.1, "note": "größer \udcff", "steps": 20})  # a file name that is not UTF-8


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
    assert written["metrics"] == {"loss": 0.1, "note": "größer \udcff", "steps": 20}
    first = path.read_bytes()
    save_pertnn(path, again, card)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["nets.safetensors"]


@pytest.mark.parametrize("changes, match", [
    ({"format_version": 2}, '"format_version" 2 in the card, this release reads 1; update'),
    ({"format_version": 0}, '"format_version" 0'),
    ({"format_version": None}, 'no whole number "format_version"'),
    ({"format_version": True}, 'no whole number "format_version"'),
    ({"recipee": "paper"}, r"unknown key 'recipee' in the card \(did you mean .recipe.\?\)"),
    ({"recipe": "improved"}, "recipe 'improved'; this release runs paper"),
    ({"inputs": ["mean"]}, r"its networks read \['mean'\]"),
    ({"hidden": "64"}, '"hidden" in the card is not of type int'),
    ({"hidden": 63}, "its card asks for"),
    ({"names": [1, 2, 3]}, '"names" in the card is not of type'),
    ({"names": list(NAMES[:2])}, "its card asks for"),
    ({"names": [NAMES[0], NAMES[1], NAMES[0]]}, "two networks are named model.embed_tokens.weight"),
    ({"names": ["a", "b", "c\nd"]}, r"'c\\nd' is no name"),
    ({"names": None}, 'the card has no "names"'),
    ({"metrics": {"loss": float("nan")}}, '"metrics" in the card'),
    ({"metrics": {"loss": [1]}}, '"metrics" in the card'),
    ({"tensors": {"w1": torch.zeros(3, 64, 6)}}, "its card asks for"),
    ({"tensors": {"b2": torch.zeros(3, dtype=torch.float16)}}, "F16"),
    ({"tensors": {"w3": torch.zeros(3)}}, "w3"),
    ({"tensors": {"b2": torch.tensor([0.0, float("nan"), 1.0])}}, "network of model.layers.0.q_proj.weight"),
    ({"names": [], "tensors": {"w1": torch.zeros(0, 64, 5), "b1": torch.zeros(0, 64),
                               "w2": torch.zeros(0, 64), "b2": torch.zeros(0)}}, "0 networks of 64"),
])
def test_cards_and_tensors_that_do_not_fit_are_refused(tmp_path, changes, match):
    path, _ = saved(tmp_path)
    refused(rewritten(path, **changes), match)


@pytest.mark.parametrize("card", [
    "", "[]", "{}", "{", "null", "[" * 100_000, '{"format_version": ' + "9" * 9999 + "}", " " * 5_000_000])
def test_cards_that_are_no_card(tmp_path, card):
    path = tmp_path / "nets.safetensors"
    save_file({"w1": torch.zeros(1)}, path, metadata={METADATA_KEY: card})
    refused(path, "the card (is not JSON|has no whole number|has 5000000 characters)")


def test_safetensors_without_card_or_cut(tmp_path):
    path, _ = saved(tmp_path)
    whole = path.read_bytes()
    for size in (9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "damaged safetensors file")
    save_file({"w1": torch.zeros(1)}, path)
    refused(path, 'no card .metadata "zo_finetuner.pertnn".: not a learned optimizer')
    with path.open("r+b") as stream:
        stream.truncate(2**30)
    refused(path, "a learned optimizer has at most")


@pytest.mark.parametrize("function, error, raised", [
    ("replace", OSError(28, "No space left on device"), InputError),
    ("fsync", OSError(5, "I/O error"), InputError),
    ("fsync", KeyboardInterrupt(), KeyboardInterrupt)])
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


@pytest.mark.parametrize("name, card, change, match", [
    ("nets.pth", CARD, None, "is saved as .safetensors"),
    ("missing/nets.safetensors", CARD, None, "there is no folder"),
    ("nets.safetensors", Card(source="x", metrics={"loss": float("nan")}), None, "the card is no JSON"),
    ("nets.safetensors", Card(source="x", metrics={"loss": torch.ones(1)}), None, "the card is no JSON"),
    ("nets.safetensors", Card(source="x", recipe="papers"), None, r"recipe 'papers' \(did you mean .paper."),
    ("nets.safetensors", Card(source="x" * (1 << 23)), None, "the card has 8"),
    ("nets.safetensors", Card(source="x", format_version=2), None, '"format_version" 2'),
    ("nets.safetensors", CARD, float("nan"), "NaN or infinite weights in the network of model.norm.weight"),
])
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
