"""The readers that are fuzzed: what broken files each is given, and how it reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzed_runs import (
    checkpoint_folders,
    journals,
    logs,
    read_a_log,
    read_a_run,
    read_all_of_a_journal,
    read_checkpoint,
    read_saved,
    run_folders,
    states,
)
from fuzzed_tensors import (
    HEADER,
    adapter_folders,
    folder_files,
    learned,
    published,
    read_adapter,
    read_learned,
    safetensors_like,
    torch_zips,
    whole_folders,
    with_tokenizer,
)
from fuzzed_texts import own_files, read_own, read_rows, read_texts, row_files, text_files, yaml_like
from hypothesis import strategies as st
from mutations import sometimes_mangled

from zo_finetuner.config import resolve
from zo_finetuner.learning.checkpoint import STATE
from zo_finetuner.loading import check_folder, check_safetensors, load_model
from zo_finetuner.pertnn_io import METADATA_KEY

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
