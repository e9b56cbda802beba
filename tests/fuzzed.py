"""The readers that are fuzzed: what a valid file of each looks like, how it is broken, and what reads it."""

from __future__ import annotations

import atexit
import io
import json
import lzma
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy
import torch
from bounded import contents
from hypothesis import strategies as st
from models import save_model
from mutations import edited, mangled, places, sometimes_mangled
from safetensors.torch import save
from torch_files import NAMES, network

from zo_finetuner.adapters import Adapter
from zo_finetuner.cards import RECIPES, Card
from zo_finetuner.checkpoints import SUMS, is_whole, sums
from zo_finetuner.config import resolve
from zo_finetuner.data import load_splits
from zo_finetuner.errors import InputError
from zo_finetuner.journal import FORMAT_VERSION, MAGIC, Header, Layout, read_journal
from zo_finetuner.learning.checkpoint import STATE, saved_state
from zo_finetuner.learning.show import describe_card, held_bytes, scales_to_show
from zo_finetuner.learning.text import read_documents
from zo_finetuner.loading import check_folder, check_safetensors, load_model
from zo_finetuner.own.splits import load_own
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import METADATA_KEY, load_pertnn
from zo_finetuner.positions import best_of, read_log
from zo_finetuner.report_page import html_page
from zo_finetuner.runs import grouped, read_run
from zo_finetuner.scale_net import ScaleNet
from zo_finetuner.state_files import digest, write_state
from zo_finetuner.tasks import get_task

HEADER = save({"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(2, 4, dtype=torch.bfloat16)})
Files = st.SearchStrategy[dict[str, bytes]]


@dataclass(frozen=True)
class Reader:
    """files: strategy of all files that change from input to input.  read: takes their folder.  prepare: writes those
    that stay.  cost: by which `make test` divides the number of inputs."""

    files: Files
    read: Callable[[Path], Any]
    prepare: Callable[[Path], dict[str, bytes]] = lambda folder: {}
    cost: int = 1


def file(name: str, content: st.SearchStrategy[bytes]) -> Files:
    return content.map(lambda data: {name: data})


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# --- safetensors ---


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def safetensors_like(draw: Any, data: bytes, card: str = "") -> bytes:
    """A safetensors file whose header, card (the metadata of that name) or bytes may be broken."""
    header, tensors = taken_apart(data)
    if card and draw(st.booleans()):
        header["__metadata__"][card] = draw(edited(json.loads(header["__metadata__"][card])))
        raw = encoded(json.dumps(header))
    else:
        raw = encoded(draw(edited(header)))
    whole = len(raw).to_bytes(8, "little") + raw + tensors
    return draw(mangled(whole)) if draw(st.integers(0, 3)) == 3 else whole


def learned(kind: str) -> bytes:
    if kind == "paper":
        nets, sigma = PertNN.fresh(NAMES, hidden=4, seed=1), (0.9, 1.0, 1.1)
    else:
        nets, sigma = ScaleNet.fixed(NAMES, [640, 1024, 32], torch.tensor([0.5, 1.0, 2.0]), source="x"), (0.5, 1.0, 2.0)
    card = Card(
        source="zo learn", base_model="a/b", base_fingerprint="shapes:0123456789abcdef weights:0123456789abcdef",
        recipe=kind, inputs=RECIPES[kind], hidden=nets.hidden, tasks=("sst2",), metrics={"loss": 0.5, "steps": 20},
        curve=(1.0, 0.5), sigma=sigma, names=NAMES,
    )  # fmt: skip
    tensors = {name: tensor.detach().contiguous() for name, tensor in nets.state_dict().items()}
    return save(tensors, metadata={METADATA_KEY: card.to_json()})


def read_learned(folder: Path) -> None:
    nets, card = load_pertnn(next(folder.iterdir()))
    sigma, meaning = scales_to_show(nets, card)
    describe_card(card, sigma, meaning, held_bytes(nets))


# --- torch.save ---


@st.composite
def torch_zips(draw: Any, data: bytes) -> bytes:
    """A torch.save file whose pickle or bytes may be broken; sums are made anew after the pickle is."""
    if draw(st.booleans()):
        return draw(mangled(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = draw(spliced(entries[name]) | mangled(entries[name], 2) | st.just(entries[name]))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for key, content in entries.items():
            archive.writestr(key, content)
    return made.getvalue()


OPCODES = [pickle.POP, pickle.DUP, pickle.MARK, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.TUPLE1, pickle.TUPLE,
           pickle.EMPTY_DICT, pickle.SETITEM, pickle.BINPERSID, pickle.NONE, pickle.STACK_GLOBAL, pickle.STOP,
           b"cposix\nsystem\n", b"cbuiltins\neval\n", pickle.BINUNICODE + b"\x02\x00\x00\x00id", pickle.TUPLE1 * 5000,
           b"\x8a\xff" + b"\xff" * 255, b"h\x00" * 50, b"cposix\nsystem\nX\x02\x00\x00\x00id\x85R"]  # fmt: skip


@st.composite
def spliced(draw: Any, program: bytes) -> bytes:
    """Opcodes put into a pickle."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(places(len(program)))
        program = program[:at] + draw(st.sampled_from(OPCODES)) + program[at:]
    return program


def published() -> bytes:
    torch.manual_seed(0)
    made = io.BytesIO()
    torch.save({name: network(hidden=4) for name in NAMES}, made)
    return made.getvalue()


# --- journals ---

RECORDS = 3


def journal() -> Header:
    """Of MeZO in place with decay, on two tensors with learned scales."""
    return Header(
        kind="sum", layout=asdict(Layout(losses=2, coefs=1, probes=3, decay=1, scales=2)), seed=7, eps=1e-3,
        weight_decay=0.1, dist="normal", probing="inplace", backend="cpu", device="cpu", versions={"torch": "2"},
        noise_contract=1, fingerprint="shapes:0123456789abcdef weights:0123456789abcdef",
        tensors=[["a", 1, [2, 3], "float32"], ["b", 2, [4], "float32"]], method_name="mezo", terms=[0],
        trail=[[0, 0], [0, 0], [0, 0]], method={"name": "mezo"}, run={"steps": 3},
    )  # fmt: skip


@st.composite
def journals(draw: Any) -> bytes:
    """A journal whose header, records or bytes may be broken; sums are made anew but for the last."""
    header = journal()
    text = encoded(draw(edited(asdict(header)))) if draw(st.booleans()) else encoded(json.dumps(asdict(header)))
    records = numpy.zeros(RECORDS, header.record.dtype)
    records["step"] = range(RECORDS)
    body = records.tobytes()
    if draw(st.integers(0, 2)) == 2:
        body = draw(mangled(body, 2))
    size = header.record.size
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    parts = [part[:-4] + zlib.crc32(part[:-4]).to_bytes(4, "little") if len(part) == size else part for part in parts]
    start = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    whole = start + zlib.crc32(start).to_bytes(4, "little") + b"".join(parts)
    return draw(mangled(whole)) if draw(st.integers(0, 3)) == 3 else whole


def read_all_of_a_journal(folder: Path) -> None:
    found = read_journal(folder / "x.zoj")
    assert len(found.upto(None)) == found.steps - found.header.first_step and len(found.header.names) >= 0


# --- the state of `zo learn` ---

STATE_TREE = {
    "settings": {"eps": 0.1, "tasks": ["sst2"]}, "window": 1, "points": [torch.ones(3)], "adam": {0: torch.ones(())},
}  # fmt: skip


@lru_cache  # of two texts of metadata safetensors writes either first
def state_file() -> bytes:
    with TemporaryDirectory() as folder:
        write_state(Path(folder) / STATE, STATE_TREE)
        return (Path(folder) / STATE).read_bytes()


@st.composite
def states(draw: Any) -> bytes:
    """A state whose tree, header or bytes may be broken; the digest is made anew after the tree is."""
    data = state_file()
    if draw(st.booleans()):
        return draw(safetensors_like(data))
    header, tensors = taken_apart(data)
    text = draw(edited(json.loads(header["__metadata__"]["tree"])))
    header["__metadata__"] |= {"tree": text, "digest": digest(text, [torch.ones(3), torch.ones(())])}
    raw = encoded(json.dumps(header))
    return len(raw).to_bytes(8, "little") + raw + tensors


def read_saved(folder: Path) -> None:
    saved_state(folder, STATE_TREE["settings"], resume=True, overwrite=False)


# --- checkpoints of the Trainer ---


@lru_cache
def checkpoint_files() -> dict[str, bytes]:
    """What a checkpoint has, and its sums."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": {0: torch.ones(3)}}, folder / file)
        (folder / "model.safetensors").write_bytes(HEADER)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": [{"loss": 1.5}]}))
        (folder / SUMS).write_text(json.dumps(sums(folder)))
        return contents(folder)


@st.composite
def checkpoint_folders(draw: Any) -> dict[str, bytes]:
    """One file of a checkpoint broken, or none."""
    files = checkpoint_files()
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: draw(mangled(files[name]) | st.just(files[name]))}


def read_checkpoint(folder: Path) -> None:
    if not is_whole(folder):
        raise InputError(f"{folder}: is not whole")
    same = {name: data for name, data in contents(folder).items() if name != SUMS}  # whose spelling may be another
    assert same.items() <= checkpoint_files().items(), "a checkpoint that was changed is taken for a whole one"


# --- texts ---

SETTINGS = {
    "model": "a/b", "task": "sst2", "data": "rows", "output_dir": "out", "optimizer": "zo-adam", "set": {"beta1": 0.8},
    "steps": 20, "lr": 1e-6, "eps": 1e-3, "seed": 3, "resume": False, "pertnn": None, "dtype": "auto",
}  # fmt: skip
YAML = ["&a ", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!timestamp x", "!!int ''", "!!bool x", "? ",
        "- ", "2001-99-99", "0o9", "1:99:99", "!!binary x", "|\n", ">\n", "---\n", "...\n", "%YAML 9.9\n", "{" * 2000,
        "\t", "\0",
        "[*a, *a]", "0x", "\"\\ud800\"", "lr: .inf\n", "lr: .nan\n", "steps: 1e400\n", "set: [1]\n", "x: 1\n", "1: 2\n",
        "~: 1\n", "steps: 7\n", "? [a]\n: 1\n", "_: -\n", "=", "@", "`", "#"]  # fmt: skip


@st.composite
def yaml_like(draw: Any) -> bytes:
    """Settings in flow style (JSON, edited) or in lines, with what is peculiar to YAML put in."""
    if draw(st.booleans()):
        text = draw(edited(SETTINGS))
    else:
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in SETTINGS.items() if draw(st.integers(0, 5)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(places(len(text)))
        if draw(st.booleans()):
            at = text.rfind("\n", 0, at) + 1  # the start of a line
        text = text[:at] + draw(st.sampled_from(YAML)) + text[at:]
    return encoded(text)


ROWS = {
    "sst2": {"sentence": "a fine film", "label": 1},
    "copa": {"premise": "P.", "choice1": "A b.", "choice2": "C d.", "question": "cause", "label": 0},
    "record": {"passage": "p", "query": "@placeholder won", "entities": ["A", "B"], "answers": ["B"]},
    "squad": {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
}


@st.composite
def lines_like(draw: Any, row: Any) -> bytes:
    """Three rows in JSON lines, one of them edited."""
    whole, at = json.dumps(row), draw(st.integers(0, 2))
    broken = draw(edited(row))
    return encoded("".join(f"{broken if i == at else whole}\n" for i in range(3)))


@st.composite
def row_files(draw: Any) -> dict[str, bytes]:
    task = draw(st.sampled_from(sorted(ROWS)))
    rows = draw(sometimes_mangled(lines_like(ROWS[task])))
    return {"train.jsonl": rows, "validation.jsonl": encoded(json.dumps(ROWS[task])), "task": task.encode()}


def read_rows(folder: Path) -> None:
    task = get_task((folder / "task").read_text())
    splits = load_splits(task, folder, num_train=2, num_dev=1)
    for row in splits.train + splits.dev + splits.test:
        [(task.prompt(row) + option).encode() for option in task.candidates(row)]


LINES = lzma.compress(b"one document\nanother one\n")


@st.composite
def text_files(draw: Any) -> dict[str, bytes]:
    """One of three kinds is broken, the others are empty."""
    files = {"a.txt": b"", "b.txt.xz": LINES, "c.jsonl": b""}
    name = draw(st.sampled_from(sorted(files)))
    made = {"a.txt": st.just(b"one document\nanother one\n") | st.binary(max_size=40),
            "b.txt.xz": st.just(LINES), "c.jsonl": lines_like({"text": "one document"})}[name]  # fmt: skip
    return files | {name: draw(mangled(draw(made)) if name == "b.txt.xz" else sometimes_mangled(made))}


OWN = [{"prompt": "is it good?", "completion": "yes", "n": 1}, {"prompt": "is it?", "completion": "no", "n": 2}] * 2
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@lru_cache
def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OWN), made)
    return made.getvalue()


@st.composite
def own_files(draw: Any) -> dict[str, bytes]:
    """A user's rows, in one of the four kinds of files; the other files are whole."""
    table = 'prompt,completion\n"is it, really?",yes\nis it?,no\na,b\n'
    files = {"x.csv": table.encode(), "x.json": encoded(json.dumps(OWN)), "x.parquet": parquet(),
             "x.jsonl": encoded(json.dumps(OWN[0])), "kind": b""}  # fmt: skip
    name = draw(st.sampled_from(("x.csv", "x.json", "x.parquet", "x.jsonl")))
    broken = {"x.csv": mangled(files["x.csv"]), "x.parquet": mangled(files["x.parquet"]) | st.just(files["x.parquet"]),
              "x.json": sometimes_mangled(edited(OWN).map(encoded)),
              "x.jsonl": sometimes_mangled(lines_like(CHAT) | lines_like(OWN[0]))}  # fmt: skip
    return files | {name: draw(broken[name]), "kind": name.encode()}


def read_own(folder: Path) -> None:
    splits, _ = load_own(str(folder / (folder / "kind").read_text()), num_dev=1, num_eval=1)
    for place, row in splits.train + splits.dev + splits.test:
        assert str(folder) in place and repr(row)


def read_texts(folder: Path) -> None:
    for document in read_documents(folder):
        document.encode()


# --- folders of models ---

INDEX = {"metadata": {"total_size": 32}, "weight_map": {"model.norm.weight": "w.safetensors", "b": "w.safetensors"}}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4, "vocab_size": 97, "rope_theta": 1e4, "tie_word_embeddings": True}  # fmt: skip


@st.composite
def folder_files(draw: Any) -> dict[str, bytes]:
    """Config, index and a shard, one of them broken."""
    files = {"config.json": encoded(json.dumps(CONFIG)), "model.safetensors.index.json": encoded(json.dumps(INDEX)),
             "w.safetensors": HEADER}  # fmt: skip
    name = draw(st.sampled_from(sorted(files)))
    if name == "w.safetensors":
        return files | {name: draw(safetensors_like(HEADER))}
    value = CONFIG if name == "config.json" else INDEX
    return files | {name: draw(sometimes_mangled(edited(value).map(encoded)))}


def with_tokenizer(folder: Path) -> dict[str, bytes]:
    (folder / "tokenizer.json").write_bytes(b"{}")
    return {"tokenizer.json": b"{}"}


@lru_cache
def whole_model() -> dict[str, bytes]:
    """The files of a tiny model and its tokenizer."""
    with TemporaryDirectory() as folder:
        return contents(save_model(Path(folder)))


@st.composite
def whole_folders(draw: Any) -> dict[str, bytes]:
    """A model's folder, one file of which is broken."""
    files = whole_model()
    name = draw(st.sampled_from(sorted(files)))
    if name.endswith(".safetensors"):
        return files | {name: draw(safetensors_like(files[name]))}
    return files | {name: draw(sometimes_mangled(edited(json.loads(files[name])).map(encoded)))}


@lru_cache
def base_folder() -> Path:
    """A tiny model on the disk, and an adapter beside it."""
    folder = Path(mkdtemp(prefix="zo-fuzz-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    save_model(folder / "base")
    model, _ = load_model(str(folder / "base"), adapter=Adapter(kind="lora"))
    model.save_pretrained(folder / "adapter")
    return folder


@st.composite
def adapter_folders(draw: Any) -> dict[str, bytes]:
    """A saved LoRA, of whose two files one is broken."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {name: (base_folder() / "adapter" / name).read_bytes() for name in names}
    if draw(st.booleans()):
        return files | {names[1]: draw(safetensors_like(files[names[1]]))}
    config = json.loads(files[names[0]]) | {"base_model_name_or_path": str(base_folder() / "base")}
    return files | {names[0]: draw(sometimes_mangled(edited(config).map(encoded)))}


def read_adapter(folder: Path) -> None:
    try:
        load_model(str(folder))
    except InputError as error:  # the base that a broken config names is no file of the adapter's folder
        raise InputError(f"{folder}: {error}") from None


@st.composite
def logs(draw: Any) -> dict[str, bytes]:
    entry = {"loss": 1.5, "step": 2, "epoch": 0.1} if draw(st.booleans()) else {"eval_loss": 2.5, "step": 2}
    return {"log.jsonl": draw(sometimes_mangled(lines_like(entry)))}


def read_a_log(folder: Path) -> None:
    """It is never refused, but no more is believed than can be."""
    entries = read_log(folder / "log.jsonl")
    best_of(entries)
    if len(entries) < 3:
        raise InputError(f"{folder}: {len(entries)} entries are left")


RESULT = {"steps": 20, "forwards": 40, "seconds": 1.5, "metric": "accuracy", "eval_loss_before": 0.7, "eval_rows": 8,
          "eval_loss_after": 0.5, "eval_metric_before": 0.5, "eval_metric_after": 0.75, "skipped_steps": 0,
          "peak_bytes": {"training": None}, "data": {"origin": {"train": "a"}}}  # fmt: skip


@st.composite
def run_folders(draw: Any) -> dict[str, bytes]:
    """What `zo train` leaves: settings, log and result, one of them broken."""
    log = {"loss": 1.5, "eval_loss": 2.5, "zo/seconds_per_step": 0.1, "step": 2}
    files = {"config.yaml": encoded(json.dumps(SETTINGS)), "log.jsonl": encoded(json.dumps(log) + "\n"),
             "result.json": encoded(json.dumps(RESULT))}  # fmt: skip
    broken = {"config.yaml": yaml_like(), "log.jsonl": lines_like(log), "result.json": edited(RESULT).map(encoded)}
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: draw(sometimes_mangled(broken[name]))}


def read_a_run(folder: Path) -> None:
    runs = [read_run(folder)]
    html_page(runs, grouped(runs)).encode()


READERS = {
    **{
        f"learned scales, {kind}": Reader(
            file("x.safetensors", safetensors_like(learned(kind), METADATA_KEY)), read_learned
        )
        for kind in ("paper", "closed-form")
    },
    "published networks": Reader(file("x.pth", torch_zips(published())), read_learned),
    "journal": Reader(file("x.zoj", journals()), read_all_of_a_journal),
    "log": Reader(logs(), read_a_log),
    "report of a run": Reader(run_folders(), read_a_run, cost=20),
    "checkpoint": Reader(checkpoint_folders(), read_checkpoint),
    "state of learning": Reader(file(STATE, states()), read_saved),
    "settings": Reader(
        file("x.yaml", sometimes_mangled(yaml_like())), lambda folder: resolve({"config": str(folder / "x.yaml")})
    ),
    "rows": Reader(row_files(), read_rows),
    "own rows": Reader(own_files(), read_own),
    "texts": Reader(text_files(), read_texts),
    "weights": Reader(
        file("x.safetensors", safetensors_like(HEADER)), lambda folder: check_safetensors(folder / "x.safetensors")
    ),
    "model folder": Reader(folder_files(), lambda folder: check_folder(folder), with_tokenizer),
    "adapter, loaded": Reader(adapter_folders(), read_adapter, cost=10),
    "model, loaded": Reader(whole_folders(), lambda folder: load_model(str(folder)), cost=10),
}
