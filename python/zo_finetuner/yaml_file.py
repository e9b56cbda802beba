"""A YAML file of settings: lists, mappings, texts and numbers, and nothing of YAML that makes a small file large.

Ten lines of aliases to aliases stand for 10^9 values (they share memory until something prints them), a tag asks for a
type, and of a key that stands twice only the last counts: anchors, aliases, tags and repeated keys are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zo_finetuner.errors import InputError
from zo_finetuner.reading import read_text, require_shallow, shown

MOST_BYTES = 64 << 10  # PyYAML reads some 100 KB a second; a file with every setting has 2 KB
MEND = "write `key: value` lines"


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags (!...) are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is no text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file; {} for an empty one.  Raises InputError naming the file and the line."""
    text = read_text(path, MOST_BYTES)
    try:
        loaded = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{where}: is not valid YAML ({shown(reason, 200)}); {MEND}") from None
    except RecursionError:
        raise InputError(f"{path}: lists and mappings lie too deep inside each other; {MEND}") from None
    except (ValueError, LookupError, ArithmeticError) as error:  # what looks like a date or a number, and is none
        raise InputError(f"{path}: holds a value that cannot be read ({shown(str(error))}); put it in quotes") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: must hold `key: value` lines, not a {type(loaded).__name__}")
    require_shallow(loaded, len(text), str(path), MEND)
    return loaded
