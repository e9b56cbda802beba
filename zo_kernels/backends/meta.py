"""Ops on tensors without storage: results have their shapes, and nothing is computed (`zo plan` follows a step so)."""

from __future__ import annotations


def _nothing(*_: object) -> None:
    pass


axpy_ = scratch = noise = words = _nothing
