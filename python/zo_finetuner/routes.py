"""Calls of a module that go another way, inside the module's hooks, while a context lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Way = Callable[..., Any]  # (module, its forward, *args, **kwargs) -> what the call returns


class Route:
    """Stands in a module's `forward`.  `__wrapped__`, what it stands for, has the signature: `generate` reads the names
    of a forward's arguments."""

    def __init__(self, module: nn.Module, way: Way, forward: Forward):
        self._module, self._way, self.__wrapped__ = module, way, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._way(self._module, self.__wrapped__, *args, **kwargs)


@contextlib.contextmanager
def rerouted(modules: Sequence[nn.Module], way: Way) -> Iterator[None]:
    """Within it a call of a module runs `way(module, its forward, *args, **kwargs)`, around all routes that it has."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = Route(module, way, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


@contextlib.contextmanager
def rerouted_inside(module: nn.Module, way: Way) -> Iterator[None]:
    """`rerouted`, but inside all routes that the module has: on whatever batch they give it."""
    inner, forward = None, module.__dict__.get("forward")
    while isinstance(forward, Route):
        inner, forward = forward, forward.__wrapped__
    if inner is None:
        with rerouted([module], way):
            yield
        return
    inner.__wrapped__ = Route(module, way, forward)
    try:
        yield
    finally:
        inner.__wrapped__ = forward
