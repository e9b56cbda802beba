"""Every recipe is a run that `zo train` takes and `zo plan` can follow; the table says what was run for real."""

from __future__ import annotations

import pytest
import yaml

from bench import recipe_table, when_tables
from bench.recipes import FOLDER, SHAPES, plan_of, recipes
from zo_finetuner.config import RunConfig

FOUND = recipes()


def test_every_file_is_a_recipe_that_says_what_it_needs():
    assert len(FOUND) >= 9 and set(FOUND) == {path.stem for path in FOLDER.iterdir()}
    for name, recipe in FOUND.items():
        recipe.check()
        given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert recipe.output_dir == f"runs/{name}" and given["model"] in SHAPES
        assert {"optimizer", "steps", "batch_size", "dtype"} <= set(given)


def test_the_common_cases_are_there():
    adapters = {recipe.adapter for recipe in FOUND.values()}
    assert {None, "lora", "prefix"} <= adapters and any(recipe.quantize for recipe in FOUND.values())
    assert any(not recipe.task and recipe.data for recipe in FOUND.values())
    assert any(recipe.pertnn for recipe in FOUND.values())
    assert {"facebook/opt-30b", "facebook/opt-125m", "meta-llama/Llama-3.1-8B"} <= {r.model for r in FOUND.values()}


def test_a_planned_recipe_fits_where_it_says():
    plan = plan_of(FOUND["sst2-opt-125m"])
    assert (plan.parameters, plan.probing) == (125_239_296, "inplace")
    adapter = plan_of(FOUND["lora-llama-1b"])
    assert adapter.architecture == "LlamaForCausalLM with lora" and adapter.parameters == 851_968
    assert str(adapter.dtype) == "torch.bfloat16"
    assert adapter.work.read > 2 * 1.2e9 * 2  # both forwards read the frozen base
    int8 = plan_of(FOUND["int8-lora-llama-8b"])
    assert int8.quantize == "int8" and 8.0e9 < int8.memory.weights < 9.2e9  # embedding and head: 2.1e9 in 16 bits
    assert adapter.work.moved < 1e9 and adapter.memory.adam < plan_of(FOUND["learned-scales"]).memory.adam


def test_the_table_says_what_was_run(monkeypatch):
    row = {"case": "recipes", "provider": "full-llama-8b", "date": "1", "steps": 6, "on": "tiny"}
    rows = [row | {"metric": "peak_bytes", "p50": 2.0**34}, row | {"metric": "time_s", "p50": 0.25},
            row | {"metric": "tried_step_s", "p50": 1.0}, row | {"case": "step", "metric": "time_s"}]  # fmt: skip
    text = recipe_table.table_of(rows)
    assert "| Llama-3.1-8B, all weights, bf16 | rte |" in text
    assert "| 16.0 GiB |  |  | 250 ms | 6 steps on tiny, CPU |" in text
    assert text.count("| no |") == len(FOUND) - 1


def test_memory_is_of_the_models_that_are_trained_whole():
    row = {"case": "recipes", "provider": "full-opt-30b", "date": "1", "metric": "adam_bytes", "p50": 2.0**40}
    text = when_tables.memory([row])
    assert "| opt-30b, bfloat16 |  |  | 1024.0 GiB |" in text and "Llama-3.1-8B" in text and "Llama-3.2-1B" not in text


@pytest.mark.parametrize(("more", "what"), [
    ({}, "all weights, bf16"), ({"adapter": "lora", "lora_rank": 4}, "LoRA of rank 4, bf16"),
    ({"adapter": "lora", "quantize": "int8"}, "LoRA of rank 8, base in int8"),
    ({"adapter": "prefix"}, "prefix of 5, bf16"),
])  # fmt: skip
def test_what_is_trained_in_words(more, what):
    assert recipe_table.trained(RunConfig(dtype="bfloat16", **more)) == what
