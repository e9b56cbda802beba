"""Files of tensors that are fuzzed: learned scales, published networks, weights, folders of models and adapters."""

from __future__ import annotations

import atexit
import io
import json
import pickle
import zipfile
from functools import lru_cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from bounded import contents
from hypothesis import strategies as st
from models import save_model
from mutations import edited, encoded, mangled, places, sometimes_mangled
from safetensors.torch import save
from torch_files import NAMES, network

from zo_finetuner.adapters import Adapter
from zo_finetuner.cards import RECIPES, Card
from zo_finetuner.errors import InputError
from zo_finetuner.learning.show import describe_card, held_bytes, scales_to_show
from zo_finetuner.loading import load_model
from zo_finetuner.pertnn import PertNN
from zo_finetuner.pertnn_io import METADATA_KEY, load_pertnn
from zo_finetuner.scale_net import ScaleNet

HEADER = save({"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(2, 4, dtype=torch.bfloat16)})


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
