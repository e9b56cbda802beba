"""Autocast and weights that change under it.

Autocast keeps its 16-bit copy of a trainable fp32 weight for the whole outermost context, by the parameter and not by
what it holds.  A second probe, a slice of a head or a forward after an update would be given the copy made before:
under `bf16=True` of a Hugging Face Trainer a step's second loss would be the first's, but for norms and embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def casts_not_kept() -> Iterator[None]:
    """Within the context every forward casts the weights as they are, in autocast contexts begun inside it too; none
    of the copies made before it is used again."""
    kept = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
