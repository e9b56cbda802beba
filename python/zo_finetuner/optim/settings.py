"""A method from its name and settings: parts chosen, values typed and checked, before any model is loaded.

A setting is a field of the method or of one of its parts whose default is a number, a truth value or a text, and the
name of a part (`rule`, `estimator`, `subset`) chooses which one it is:

    build("zo-adam", {"beta1": "0.8", "estimator": "one-sided", "probes": "4"})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from zo_finetuner.errors import InputError, nearest
from zo_finetuner.optim.base import Method, Part
from zo_finetuner.optim.bayesian import Bayesian
from zo_finetuner.optim.conservative import Conservative
from zo_finetuner.optim.estimators import Central, OneSided
from zo_finetuner.optim.forward_grad import ExactSlope
from zo_finetuner.optim.guided import Guided
from zo_finetuner.optim.rules import RULES
from zo_finetuner.optim.sparse import Everything, Small

PARTS: dict[str, dict[str, type[Part]]] = {
    "estimator": {
        "central": Central, "one-sided": OneSided, "guided": Guided, "bayesian": Bayesian, "slope": ExactSlope,
        "conservative": Conservative,
    },  # fmt: skip
    "rule": RULES,
    "subset": {"all": Everything, "small": Small},
}
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def build(name: str, kind: type[Method], preset: Mapping[str, Any], given: Mapping[str, Any]) -> Method:
    """A method of `kind`, named `name`: its preset with what is given on top.  Raises InputError naming the setting."""
    fields = {field.name for field in dataclasses.fields(kind)}
    for part in PARTS:
        if part in given and part not in fields:
            raise InputError(f"{name} takes no {part}: {kind.fixed[part]}")
    before = {part: _choose(part, preset.get(part), kind) for part in PARTS if part in fields}
    classes = {part: _choose(part, given[part], kind) if part in given else old for part, old in before.items()}
    # A part that is chosen away takes the preset's values for it along.
    gone = {name for part, old in before.items() if old is not classes[part] for name in settings_of(old)}
    taken = {**{name: value for name, value in preset.items() if name not in gone}, **given}
    known = {setting for owner in (kind, *classes.values()) for setting in settings_of(owner)}
    for setting in given:
        if setting not in known and setting not in PARTS:
            raise InputError(f'{name} has no setting "{setting}"{nearest(setting, known)}; it has: '
                             f"{', '.join(sorted(known | classes.keys()))}")
    values = {owner: _values(owner, taken) for owner in (kind, *classes.values())}
    return kind(name=name, **values[kind], **{part: owner(**values[owner]) for part, owner in classes.items()})


def settings_of(owner: type) -> dict[str, Any]:
    """Names and defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(owner)
        if field.init and field.name != "name" and isinstance(field.default, bool | int | float | str)
    }


def _choose(part: str, choice: Any, kind: type[Method]) -> type[Part]:
    if choice is None:
        return next(field.default_factory for field in dataclasses.fields(kind) if field.name == part)
    if choice not in PARTS[part]:
        raise InputError(f'unknown {part} "{choice}"{nearest(str(choice), PARTS[part])}; there are: '
                         f"{', '.join(PARTS[part])}")
    return PARTS[part][choice]


def _values(owner: type, taken: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _typed(n, taken[n], default) for n, default in settings_of(owner).items() if n in taken}


def _typed(name: str, value: Any, default: Any) -> Any:
    """Flags are texts, YAML has types (and reads 1e-6 as a text)."""
    kind = type(default)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, bool) or (kind is str) or (kind is int and isinstance(value, float) and value % 1):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise InputError(f"setting {name} must be {_KINDS[kind]}, got {value!r}") from None
