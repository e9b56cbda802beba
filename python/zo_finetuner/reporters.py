"""Reporters of the Hugging Face Trainer (`--report-to`): asked before a run whether they are known and can begin."""

from __future__ import annotations

import sys
from typing import Any

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.reading import shown


def require_reporter(name: str) -> None:
    """InputError for a reporter that transformers does not know, and for one that cannot begin here, in its own words:
    mostly its package is not installed."""
    if name == "none":
        return
    from transformers.integrations import get_reporting_integration_callbacks as callbacks_of
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    choices = ("none", "all", *INTEGRATION_TO_CALLBACK)
    if name not in choices:
        raise InputError(f'unknown report_to "{shown(name)}"{nearest(name, choices)}; there are: {", ".join(choices)}')
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # some that cannot begin fail once more as they go
    try:
        reasons = [_why_not(callback) for callback in callbacks_of(name)]
    finally:
        sys.unraisablehook = hook
    if reason := next(filter(None, reasons), ""):
        raise InputError(f"report_to {name}: {reason}")


def _why_not(callback: Any) -> str:
    """Why a reporter cannot begin; empty where it can."""
    try:
        callback()
    except Exception as error:  # each package has its own
        return shown(" ".join(str(error).split()) or type(error).__name__, 300)
    return ""
