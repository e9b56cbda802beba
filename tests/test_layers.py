"""Each layer imports only the ones below it: cli, hf -> engine -> optim, objective -> zo_kernels -> csrc.

Read from the syntax trees, imports inside functions included.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"zo_kernels": ROOT / "zo_kernels", "zo_finetuner": ROOT / "python" / "zo_finetuner"}


def modules(package: str) -> dict[str, Path]:
    """Dotted module name -> file."""
    folder, found = SOURCES[package], {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = {**modules("zo_kernels"), **modules("zo_finetuner")}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Modules imported anywhere in a module; `from package import submodule` counts as both."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & (
                {node.module} | set(MODULES)
            )
    return frozenset(found)


def reached(module: str) -> set[str]:
    """Our modules that importing this one brings in, directly or not (packages' __init__ aside)."""
    seen, left = set(), [module]
    while left:
        for name in imports(left.pop()) & set(MODULES):
            if name not in seen and name not in SOURCES:
                seen.add(name)
                left.append(name)
    return seen


def test_the_walk_sees_the_packages():
    assert {
        "zo_kernels.ops",
        "zo_kernels.backends.cpu",
        "zo_finetuner.engine",
        "zo_finetuner.optim.mezo",
    } <= set(MODULES)
    assert "zo_kernels.noise" in reached("zo_kernels.ops")
    assert "zo_finetuner.engine" in reached("zo_finetuner.hf")


@pytest.mark.parametrize("module", modules("zo_kernels"))
def test_kernels_know_torch_and_triton_only(module):
    allowed = {"torch", "triton", "zo_kernels", *sys.stdlib_module_names}
    outside = {name for name in imports(module) if name.split(".")[0] not in allowed}
    assert not outside


@pytest.mark.parametrize(
    "module", ("noise", "rounding", "blocks", "forms", "rules", "dispatch", "backends.reference", "backends.cpu")
)
def test_the_contract_and_the_backends_do_not_know_the_ops(module):
    assert "zo_kernels.ops" not in reached(f"zo_kernels.{module}")


def test_only_the_cpu_backend_touches_the_native_module():
    for module in MODULES:
        if module != "zo_kernels.backends.cpu":
            names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
            assert "_C" not in names, module


# Layer of zo_finetuner -> what it must not reach.
APPLICATION = "hf training learning evaluation data demo config cli"
ABOVE = {
    "optim": f"engine probing optimizer objective {APPLICATION}",
    "objective": f"engine probing optimizer optim {APPLICATION}",
    "pertnn": f"engine probing optimizer objective {APPLICATION}",
    "engine": f"optimizer {APPLICATION}",
    "optimizer": APPLICATION,
    "hf": "training learning evaluation data demo config cli",
    "learning": "hf training demo config cli",
    "training": "demo cli",
}


@pytest.mark.parametrize("layer", ABOVE)
def test_a_layer_reaches_nothing_above_it(layer):
    own = [m for m in MODULES if f"{m}.".startswith(f"zo_finetuner.{layer}.")]
    assert own, f"zo_finetuner.{layer} is gone: mend this table"
    above = {f"zo_finetuner.{name}" for name in ABOVE[layer].split()}
    for module in own:
        assert not reached(module) & above, module


@pytest.mark.parametrize("module", [m for m in modules("zo_finetuner") if not m.endswith(".environment")])
def test_the_engine_uses_ops_not_backends(module):
    assert not [
        m for m in imports(module) if m.startswith(("zo_kernels.backends", "zo_kernels.triton_kernels"))
    ]


RANDOM = set(
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson "
    "manual_seed Generator default_generator get_rng_state set_rng_state "
    "normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ log_normal_ geometric_ "
    "kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ trunc_normal_".split()
)


@pytest.mark.parametrize("module", modules("zo_finetuner"))
def test_a_direction_never_comes_from_a_generator(module):
    """Noise is a function of (seed, tensor, element); fresh PertNNs and the demo's model may be drawn."""
    if module == "zo_finetuner.demo":
        return
    allowed = set()
    if module == "zo_finetuner.pertnn":
        fresh = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef) and n.name == "fresh"]
        assert len(fresh) == 1
        allowed = set(ast.walk(fresh[0]))
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and node.attr in RANDOM and node not in allowed:
            pytest.fail(f"{module}, line {node.lineno}: {node.attr}")


@pytest.mark.parametrize("module", modules("zo_finetuner"))
def test_no_pointer_above_the_kernels(module):
    """`coverage` asks which parameter a storage belongs to."""
    if module == "zo_finetuner.coverage":
        return
    lines = [
        n.lineno for n in ast.walk(tree(module)) if isinstance(n, ast.Attribute) and n.attr == "data_ptr"
    ]
    assert not lines
