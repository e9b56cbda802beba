"""The base model's own weights, which every window of learning starts from.

They are read again from the checkpoint's files, one tensor at a time; where the files do not hold the parameters under
their names (a converted architecture, a model that was never saved), a copy in host memory is kept, and said.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zo_finetuner.errors import InputError
from zo_finetuner.learning.streaming import Weights
from zo_finetuner.tensor_files import read_header

logger = logging.getLogger(__name__)


class BaseWeights:
    """Remembers the weights as they are now; `restore` puts them back, bit for bit.

    source: folder of the checkpoint they were loaded from, or None."""

    def __init__(self, weights: Weights, source: str | Path | None = None):
        self._weights = weights
        self._files = {} if source is None else _files_of(weights, Path(source))
        self.on_disk = bool(self._files)
        if not self.on_disk:
            self._copies = [tensor.to("cpu", copy=True) for tensor in weights.blocks.tensors]
            size = sum(copy.nbytes for copy in self._copies)
            logger.info("the base weights are kept in host memory (%.1f GB): no file holds them by name", size / 1e9)

    @torch.no_grad()
    def restore(self) -> None:
        """Raises InputError when a file has gone or changed its layout since."""
        blocks = self._weights.blocks
        if not self.on_disk:
            for tensor, copy in zip(blocks.tensors, self._copies, strict=True):
                tensor.copy_(copy)
            return
        for file, names in self._files.items():
            try:
                with safe_open(file, "pt") as content:
                    for name in names:
                        blocks.tensors[blocks.index[name]].copy_(content.get_tensor(name))
            except (SafetensorError, OSError, RuntimeError) as error:
                raise InputError(f"{file}: the base model's weights cannot be read again ({error})") from None


def _files_of(weights: Weights, folder: Path) -> dict[Path, list[str]]:
    """File -> names of the blocks in it; empty unless the files hold every block with exactly these values."""
    blocks, held = weights.blocks, defaultdict(list)
    for file in sorted(folder.glob("*.safetensors")):
        stored_names = read_header(file).tensors.keys()
        with safe_open(file, "pt") as content:
            for name in stored_names & set(blocks.names):
                stored, tensor = content.get_tensor(name), blocks.tensors[blocks.index[name]]
                if stored.shape == tensor.shape and torch.equal(stored.to(tensor.device, tensor.dtype), tensor):
                    held[file].append(name)
    complete = sum(map(len, held.values())) == len(blocks)
    return {file: sorted(names) for file, names in held.items()} if complete else {}
