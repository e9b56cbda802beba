"""What a file can do to its reader, one by one: pipes, devices, endless lines, lies (at random: test_fuzz_readers)."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest
import torch
from bounded import bounded, contents
from fuzzed import READERS
from fuzzed_tensors import CONFIG, HEADER, INDEX, learned, taken_apart
from models import save_model, save_rows
from safetensors.torch import load_file, save_file

from zo_finetuner.adapters import Adapter
from zo_finetuner.cards import fingerprint
from zo_finetuner.cli import main
from zo_finetuner.config import resolve
from zo_finetuner.errors import InputError
from zo_finetuner.files import write_text
from zo_finetuner.learning.text import read_documents
from zo_finetuner.loading import check_folder, check_safetensors, load_model
from zo_finetuner.optim import make_method
from zo_finetuner.own import files
from zo_finetuner.own.files import read_source
from zo_finetuner.pertnn_io import METADATA_KEY, load_pertnn, save_pertnn
from zo_finetuner.reading import MOST_DEPTH, MOST_LINE, parse_json, read_bytes, read_lines
from zo_finetuner.scale_net import ScaleNet
from zo_finetuner.training import _saved_before

#: A file of every reader in `fuzzed.READERS`.
FILES = {
    "learned scales, paper": "x.safetensors", "journal": "x.zoj", "published networks": "x.pth", "settings": "x.yaml",
    "rows": "train.jsonl", "texts": "a.txt", "weights": "x.safetensors", "model folder": "config.json",
}  # fmt: skip


def refused(read, *words: str) -> None:
    """One InputError of one line with these words, at once and in 256 MB."""
    with pytest.raises(InputError) as caught, bounded(256 << 20):
        read()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def placed(request, tmp_path):
    """(path of the file that a reader is about to read, () -> reads it): put something there, then read."""
    name = request.param
    reader = READERS[name]
    reader.prepare(tmp_path)
    for file in ("train.jsonl", "validation.jsonl") if name == "rows" else ():
        (tmp_path / file).write_text('{"sentence": "a", "label": 1}\n')
    (tmp_path / "task").write_text("sst2") if name == "rows" else None
    return tmp_path / FILES[name], lambda: reader.read(tmp_path)


@pytest.mark.parametrize("placed", FILES, indirect=True)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(placed):
    path, read = placed
    path.unlink(missing_ok=True)
    os.mkfifo(path)  # nobody writes into it
    refused(read, f"{path}: is a pipe; give a regular file")
    path.unlink()
    path.symlink_to("/dev/zero")  # it never ends
    refused(read, f"{path}: is a device")
    path.unlink()
    path.mkdir()
    refused(read, str(path))


@pytest.mark.parametrize("placed", FILES, indirect=True)
def test_a_line_of_100_mb_is_refused_by_a_stated_limit(placed):
    path, read = placed
    with path.open("wb") as stream:
        stream.write(b'{"text": "' if path.suffix == ".jsonl" else b"x: ")
        stream.truncate(100 << 20)
    refused(read, str(path))


@pytest.mark.parametrize("placed", FILES, indirect=True)
def test_an_empty_file_is_no_crash(placed):
    path, read = placed
    path.write_bytes(b"")
    words = {".yaml": "model is missing", ".txt": ""}.get(path.suffix, str(path))
    refused(read, words) if words else read()


def test_lines_are_never_held_beyond_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + b"x" * MOST_LINE + b"\n" + b"y" * (MOST_LINE + 1))
    lines = read_lines(path)
    assert next(lines) == (f"{path}:1", b"{}") and len(next(lines)[1]) == MOST_LINE
    refused(lambda: next(lines), f"{path}:3: the line has more than {MOST_LINE:,} bytes")
    with path.open("wb") as stream:
        stream.truncate(2 << 30)
    refused(lambda: next(read_lines(path)), "has 2,147,483,648 bytes; at most 1,073,741,824 are read")


def test_a_file_is_read_into_no_more_memory_than_it_has(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"abc")
    with bounded(64 << 20):
        assert read_bytes(path, 1 << 30) == b"abc"
    if os.path.exists("/proc/self/maps"):
        refused(lambda: read_bytes(Path("/proc/self/maps"), 1 << 30), "/proc/self/maps: grows while it is read")


def test_packed_text_is_unpacked_in_pieces(tmp_path):
    """1 GB of zeros in 150 KB, and a header that asks for 1.5 GB of memory."""
    path = tmp_path / "a.txt.xz"
    packed = lzma.LZMACompressor()
    zeros = bytes(16 << 20)
    path.write_bytes(b"".join(packed.compress(zeros) for _ in range(4)) + packed.flush())
    refused(lambda: list(read_documents(path)), f"{path}:1: the line has more than")
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "preset": 0, "mf": lzma.MF_HC3}]
    small = lzma.compress(b"a\n", filters=[filters[0] | {"dict_size": 1 << 20}])
    path.write_bytes(small)
    assert list(read_documents(path)) == ["a"]
    path.write_bytes(small[:-8])
    refused(lambda: list(read_documents(path)), str(path), "pack it again")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "deeper than"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "deeper than"),
        ('{"a": 1, "b": 2, "a": 3}', 'key "a" stands twice'),
        ('{"a": {"\\n": 1, "\\n": 1}}', "key \"'\\n'\" stands twice"),
        ("[NaN]", "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        ("9" * 5000, "too many digits"),
        ('"\\ud800"', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ("{'a': 1}", "not JSON at column 2"),
        ("\ufeff{}", "not JSON at column 1"),
        ("{}\n{}", "not JSON at line 2, column 1"),
    ],
)
def test_json_that_is_not_what_it_seems(text, word):
    refused(lambda: parse_json(text, "x.json:3", "mend it"), "x.json:3: ", word, "; mend it")


def test_json_that_is_fine():
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(deep, "x", "") and parse_json('"\\ud83d\\ude00"', "x", "") == "😀"
    assert parse_json("[1e999, Infinity]", "x", "", finite=False) == [float("inf")] * 2


LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, (":1: ", "anchors and aliases are not read")),
        ("steps: *a\n", (":1: ", "anchors and aliases")),
        ("model: a\nmodel: b\n", (":2: ", "model stands twice")),
        ("model: !!python/object/apply:os.system [id]\n", (":1: ", "tags (!...) are not read")),
        ("set: {a: 1, a: 2}\n", (":1: ", "a stands twice")),
        ("? [a]\n: 1\n", (":1: ", "a key is no text")),
        ("set: " + "[" * 5000, ("too deep",)),
        ("model: 2001-99-99\n", ("cannot be read", "put it in quotes")),
        ('model: "a\\0b"\n', ('key "model" must be text in one line',)),
        ('model: "\\ud800"\n', ()),
        ("model: |\n  a\n  b\n", ('key "model" must be text in one line',)),
        ("steps: .inf\n", ('key "steps" must be an integer, got inf',)),
        ("lr: .nan\n", ("model is missing",)),
        ("steps: 1" + "0" * 5000 + "\n", ()),
        ("x: " + "y" * 70_000 + "\n", ("has 70,004 bytes; at most 65,536 are read",)),
        ("model: caf\xe9\n".encode("latin1"), ("byte 11 (0xe9) is not UTF-8",)),
    ],
)
def test_settings_that_are_not_what_they_seem(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: resolve({"config": str(path)}), str(path), *words)


def test_a_table_that_unpacks_to_more_than_it_may(tmp_path, monkeypatch):
    """A value of 1 MB that 100 rows share takes a file of a few KB."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "x.parquet"
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100), pyarrow.array(["y" * 1_000_000]))
    write_table(pyarrow.table({"text": shared}), path)
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(files, "MOST_DATA", 10_000_000)
    refused(lambda: read_source(str(path)), f"{path}: unpacks to more than 10,000,000 bytes")


# --- tensors ---


def with_header(path, **tensors) -> None:
    """HEADER with other entries."""
    header, data = taken_apart(HEADER)
    raw = json.dumps(header | tensors).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [16, 32]}, "say otherwise"),
        ({"dtype": "F32", "shape": [2**63], "data_offsets": [16, 32]}, "is not a list of sizes"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [16, 32]}, "is not a list of sizes"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [16, 32]}, "is not a list of sizes"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "tensor lm_head.weight overlaps model.norm.weight"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [20, 36]}, "leaves a gap behind"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [32, 16]}, "say otherwise"),
        ({"dtype": "F32", "shape": [8], "data_offsets": [16, 48]}, "but its header needs 48"),
        ({"dtype": "F33", "shape": [4], "data_offsets": [16, 32]}, 'unknown dtype F33 (did you mean "F32"?)'),
        ({"dtype": "F32", "shape": [4]}, "its header is not dtype, shape and data_offsets"),
        ([], "its header is not dtype"),
    ],
)
def test_headers_that_lie(tmp_path, entry, word):
    path = tmp_path / "w.safetensors"
    with_header(path, **{"lm_head.weight": entry})
    refused(lambda: check_safetensors(path), f"{path}: ", word)


def test_a_header_of_any_length_takes_no_memory(tmp_path):
    path = tmp_path / "w.safetensors"
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + HEADER[8:])
        refused(lambda: check_safetensors(path), f"{path}: is not a safetensors file, or is truncated")
    with path.open("wb") as stream:  # a header of 200 MB that is there
        stream.write((200 << 20).to_bytes(8, "little") + b"{")
        stream.truncate(300 << 20)
    refused(lambda: check_safetensors(path), "is not a safetensors file")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\nb", 3, None])
def test_shards_lie_in_the_folder(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "w.safetensors").write_bytes(HEADER)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(INDEX))
    check_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": INDEX["weight_map"] | {"b": name}}))
    refused(lambda: check_folder(tmp_path), f"{index}: tensor b is said to be in", "which is no file of this folder")


def test_the_rest_of_a_folder_is_of_regular_files(base, tmp_path):
    for path in (base[0] / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()
    os.mkfifo(tmp_path / "tokenizer_config.json")
    refused(lambda: load_model(str(tmp_path)), f"{tmp_path / 'tokenizer_config.json'}: is a pipe")
    (tmp_path / "tokenizer_config.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(1 << 30)
    refused(lambda: load_model(str(tmp_path)), "tokenizer.json: has 1,073,741,824 bytes; at most")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, ('"num_hidden_layers" is 1000000000; at most 1,024',)),
        ({"num_hidden_layers": 3}, ("tensor model.layers.2.input_layernorm.weight is not in its files (9 ",)),
        ({"hidden_size": 1 << 20}, ("have other shapes than config.json asks for",)),
        ({"vocab_size": 1 << 40}, ("",)),
        ({"hidden_size": "x"}, ("cannot be loaded",)),
        ({"_attn_implementation": "somebody/kernels"}, ("asks for code from the Hub (somebody/kernels)",)),
        ({"auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}, "model_type": "evil"}, ("",)),
    ],
)
def test_configs_that_lie_about_the_weights(base, tmp_path, change, words):
    for path in (base[0] / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught, bounded():
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "executed").exists()


def test_an_adapter_with_a_tensor_less(base, tmp_path):
    model, _ = load_model(str(base[0] / "model"), adapter=Adapter(kind="lora"))
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name, _ = tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(lambda: load_model(str(tmp_path)), f"{file}: tensor {name} is not in the file (1 are missing)")


def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".x.json.{os.getpid()}.tmp").symlink_to(victim)
    write_text(tmp_path / "x.json", "{}")
    assert victim.read_text() == "mine" and contents(tmp_path) == {"victim": b"mine", "x.json": b"{}"}


# --- cards that lie ---


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, its rows, and its scales in closed form."""
    from zo_finetuner.cards import RECIPES, Card

    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    save_rows(folder / "data")
    model, _ = load_model(str(folder / "model"))
    blocks = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    sigma = torch.linspace(0.5, 2.0, len(blocks))
    sigma[1] = 0
    names, numels = zip(*blocks, strict=True)
    card = Card(
        source="zo learn", base_model=str(folder / "model"), base_fingerprint=fingerprint(model), recipe="closed-form",
        inputs=RECIPES["closed-form"], sigma=tuple(float(f"{3 * value:.6g}") for value in sigma.tolist()),
    )  # fmt: skip
    save_pertnn(folder / "x.safetensors", ScaleNet.fixed(names, numels, sigma, source="x"), card)
    return folder, model


def lied(base, tmp_path, **changes):
    """The file of `base` with a card of these fields: path, as if somebody had edited it."""
    header, data = taken_apart((base[0] / "x.safetensors").read_bytes())
    header["__metadata__"][METADATA_KEY] = json.dumps(json.loads(header["__metadata__"][METADATA_KEY]) | changes)
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return tmp_path / "x.safetensors"


def test_scales_that_are_not_those_of_the_tensors(base, tmp_path):
    path = base[0] / "x.safetensors"
    _, card = load_pertnn(path)
    first, second, third = card.names[:3]
    for changes, words in (
        ({0: 1.6}, ('"sigma" in the card does not follow from the tensors', first)),
        ({0: 0.0}, (f"the card says that the scale of {first} is 0, the tensors that the block is kept",)),
        ({1: 0.1}, (f"the scale of {second} is 0.1, the tensors that the block is skipped",)),
        ({2: -1.0}, (f'"sigma" of {third} in the card is negative (-1)',)),
    ):
        sigma = [changes.get(i, value) for i, value in enumerate(card.sigma)]
        lie = lied(base, tmp_path, sigma=sigma)
        refused(lambda lie=lie: load_pertnn(lie), str(lie), *words)
    double = lied(base, tmp_path, sigma=[2 * value for value in card.sigma])  # another normaliser: the same scales
    assert load_pertnn(double)[0].names == card.names


def test_names_counts_and_fingerprints(base, tmp_path):
    folder, model = base
    make_method("zo-finetuner", model, pertnn=folder / "x.safetensors", batch_size=4, seed=0)
    _, card = load_pertnn(folder / "x.safetensors")
    names = list(card.names)
    for changes, words in (
        ({"names": names[:-1], "sigma": []}, ("its card asks for F32",)),
        ({"names": names[:-1]}, ("numbers for",)),
        ({"names": [*names[:-1], names[0]]}, (f"two scales are named {names[0]}",)),
        ({"names": [*names[:-1], "a\x1b[2J"]}, ('"names" in the card is no text in one line',)),
        ({"hidden": -1}, ("its card asks for F32",)),
        ({"base_fingerprint": "shapes:00"}, ("is no fingerprint of a model",)),
        ({"noise_contract": 2}, ('"noise_contract" 2 in the card', "update zo-finetuner")),
        ({"source": "x\x1b]0;owned\x07"}, ('"source" in the card is no text in one line',)),
        ({"base_model": "y" * 5000}, ('"base_model" in the card is no text in one line of at most 4096',)),
        ({"sigma": [*card.sigma[:-1], 10**400]}, ('"sigma" in the card is not of type',)),
    ):
        lie = lied(base, tmp_path, **changes)
        refused(lambda lie=lie: load_pertnn(lie), str(lie), *words)
    other = "shapes:0123456789abcdef weights:0123456789abcdef"
    for changes, words in (
        ({"base_fingerprint": other}, ("whose tensors have other names or shapes",)),
        ({"names": [*names[:-1], "model.other.weight"]}, ("scales of model.other.weight, which is no tensor of it",)),
    ):
        lie = lied(base, tmp_path, **changes)
        refused(lambda lie=lie: make_method("zo-finetuner", model, pertnn=lie, batch_size=4, seed=0), str(lie), *words)


def test_names_that_repeat_are_found_in_linear_time():
    """A search that compares all pairs would take hours."""
    names = [str(i) for i in range(200_000)] + ["199999"]
    zeros = torch.zeros(len(names))
    with pytest.raises(InputError, match="two scales are named 199999"), bounded():
        ScaleNet(names, zeros[:, None], zeros, zeros, torch.zeros(1, 1), torch.zeros(1), torch.zeros(1))


# --- at the command line ---


def damage(path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("verb", ["show", "convert", "config", "rows", "model", "index", "config.json"])
def test_one_line_and_exit_code_2_and_nothing_is_written(base, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(learned("paper")[:-9])
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04")
    (tmp_path / "x.yaml").write_text(LAUGHS)
    for part in ("model", "data"):
        (tmp_path / part).mkdir()
        for path in (base[0] / part).iterdir():
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    if verb == "rows":
        (tmp_path / "data" / "train.jsonl").write_bytes(b'{"sentence": "\xff"}')
    elif verb == "model":
        save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model" / "model.safetensors")
    elif verb == "index":
        (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    elif verb == "config.json":
        (tmp_path / "model" / "config.json").write_text("[" * 100_000)
    before = contents(tmp_path)
    train = ["train", "--model", "model", "--data", "data", "--task", "sst2", "--output-dir", "out"]
    argv = {"show": ["show", "x.safetensors"], "convert": ["convert", "x.pth", "y.safetensors"],
            "config": ["train", "--config", "x.yaml"]}.get(verb, train)  # fmt: skip
    assert main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("zo: warning: ")]  # of few rows
    assert out == "" and len(lines) == 1 and lines[0].startswith("zo: error: ")
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ("holds a list, not a JSON object",)),
        ('{"loss": "1.5"}', ('"loss" is 1.5, not a number',)),
        ('{"loss": 1.5, "accuracy": null, "n": 3}', ('"accuracy" is None, not a number',)),
        ('{"loss": 1.5, "loss": 2.5}', ('key "loss" stands twice',)),
    ],
)
def test_what_was_measured_before_is_measured_again(tmp_path, text, words):
    assert _saved_before(tmp_path, "accuracy") is None
    path = tmp_path / "before.json"
    path.write_text(text)
    refused(lambda: _saved_before(tmp_path, "accuracy"), f"{path}: ", *words, "remove the file, and it is measured")
    path.write_text('{"loss": NaN, "accuracy": 0.5, "n": 3}')
    assert _saved_before(tmp_path, "accuracy")["n"] == 3
