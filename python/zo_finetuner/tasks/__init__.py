"""The eleven tasks of the MeZO protocol: prompts, label words, sizes and metrics."""

from __future__ import annotations

from zo_finetuner.tasks.metrics import accuracy, exact_match, f1, normalize_answer
from zo_finetuner.tasks.templates import TASKS, Task, get_task

__all__ = ["TASKS", "Task", "accuracy", "exact_match", "f1", "get_task", "normalize_answer"]
