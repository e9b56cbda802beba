"""The reader of published files against hostile and damaged ones: refused in one line, nothing executed."""

from __future__ import annotations

import copyreg
import os
import pickle
import random
import warnings
import zipfile
import zlib

import pytest
import torch
from torch_files import (
    FLOAT,
    LINEAR,
    NAMES,
    ORDERED_DICT,
    integer,
    network,
    program,
    refused,
    storage,
    text,
    torch_file,
    torch_zip,
    tuple_of,
    view,
    word,
)

from zo_finetuner import pertnn_io, restricted_pickle
from zo_finetuner.errors import InputError
from zo_finetuner.pertnn_io import load_pertnn


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
            word("functools", "partial") + tuple_of(word("os", "system"), text(command)) + b"R)R"
        ),
        "__setstate__ by BUILD": program(
            word("collections", "Counter")
            + b")R}"
            + text("__setstate__")
            + word("os", "system")
            + b"sb"
            + text(command)
            + b"b"
        ),
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


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.nn.modules.activation.ReLU",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_tensor",
        "torch.nn.modules.linear.Linear.forward",
        "torch.DoubleStorage",
        "torch.hub.load",
        "numpy.load",
        "builtins.getattr",
    ],
)
def test_a_global_is_refused_by_name(tmp_path, name):
    """Also without a call, and also as a walk from an allowed name."""
    module, _, attribute = name.rpartition(".")
    refused(torch_zip(tmp_path / "nets.pth", program(word(module, attribute))), f"asks for '{name}'")
    if name.startswith("torch.nn.modules.linear"):
        walk = word("torch.nn.modules.linear", "Linear.forward")
        refused(torch_zip(tmp_path / "nets.pth", program(walk)), f"asks for '{name}'")


@pytest.mark.parametrize(
    "body, match",
    [
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
    ],
)
def test_malformed_programs_are_refused(tmp_path, body, match):
    refused(torch_zip(tmp_path / "nets.pth", program(body)), match)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        program(b"\x85"),
        program(b"R"),
        program(b"s"),
        program(b"u"),
        program(b"t"),
        program(b"b"),
        program(b"q\x00"),
        program(b"h\x07"),
        program(b"j\xff\xff\xff\xff"),
        b"\x80\x02X\xff\xff\xff\x7fa",
        b"\x80\x02X\x00",
        b"\x80\x02ctorch",
        program(b"X\x01\x00\x00\x00\xff"),
        program(b"N")[:-1],
        program(b"N") + b"N",
        program(b"\x96" + b"\xff" * 8),
        program(b"\x95" + b"\xff" * 8),
        program(b"\x8b\xff\xff\xff\x7f"),
        program(b"I" + b"9" * 9999 + b"\n"),
        program(b"0"),
        program(b"Q"),
        program(b"P../../x\n"),
        b"\xff" * 64,
    ],
)
def test_broken_bytes_are_refused(tmp_path, data):
    refused(torch_zip(tmp_path / "nets.pth", data), "refused, nothing was executed")


@pytest.mark.parametrize(
    "body", [b"X\xff\xff\xff\x7fabc", b"X\x04\x00\x00\x00abc", b"ctorch", b"ctorch\nload", b"J\x00"]
)
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


@pytest.mark.parametrize(
    "identity, match",
    [
        (text("storage"), "the persistent id 'storage' is no storage"),
        (tuple_of(text("module"), LINEAR, text("x.py"), text("import os")), "the persistent id a tuple"),
        (tuple_of(text("storage"), LINEAR, text("0"), text("cpu"), integer(1)), "a storage '0' of torch.nn"),
        (tuple_of(text("storage"), text("FloatStorage"), text("0"), text("cpu"), integer(1)), "'FloatStorage'"),
        (tuple_of(text("storage"), FLOAT, integer(0), text("cpu"), integer(1)), "a storage 0 of"),
        (tuple_of(text("storage"), FLOAT, text("0"), text("cpu"), integer(-1)), "with -1 elements"),
        (tuple_of(text("storage"), FLOAT, text("0"), text("cpu"), b"\x88"), "with True elements"),
        (tuple_of(text("storage"), FLOAT, text("0"), text("cpu"), integer(2**31 - 1)), "with 2147483647 "),
    ],
)
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


@pytest.mark.parametrize(
    "offset, shape, stride",
    [
        (1, (64, 5), (5, 1)),
        (320, (1,), (1,)),
        (0, (65, 5), (5, 1)),
        (0, (64, 5), (6, 1)),
        (0, (0,), (1,)),
        (0, (2, 2), (319, 1)),
        (-1, (64, 5), (5, 1)),
        (0, (64, 5), (-5, 1)),
        (0, (-64, 5), (5, 1)),
        (0, (64, 5), (5,)),
        (0, (1000, 1000), (0, 0)),
        (2**31 - 1, (1,), (1,)),
        (0, (1,) * 5, (1,) * 5),
        (0, (2**24, 2**24), (2**24, 2**24)),
    ],
)
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
    refused(tmp_path, "is a folder; give a regular file")
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
    refused(path, "has 16,777,217 bytes; at most 16,777,216 are read")


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
    path = torch_zip(
        tmp_path / "nets.pth",
        program(tuple_of(*(storage(info.filename[-4:], integer(info.file_size // 4)) for info in infos))),
    )
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
