"""`zo plan`: published parameter counts, predicted bytes against those that a real step allocates, rates, the verb."""

from __future__ import annotations

import gc
import json
import math
from itertools import accumulate

import pytest
import torch
from models import BUILDERS, tiny
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, OPTConfig

from zo_finetuner import slices
from zo_finetuner.cli import main
from zo_finetuner.devices import GPUS, Device, described, find_device, probe_cpu
from zo_finetuner.encoding import collate
from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.history import History
from zo_finetuner.learning.improved import WARM, ImprovedRecipe
from zo_finetuner.learning.profile import Mean
from zo_finetuner.learning.streaming import Turn, Weights
from zo_finetuner.loading import empty_model
from zo_finetuner.objective import training_loss
from zo_finetuner.optim import make_method
from zo_finetuner.params import trainable_blocks
from zo_finetuner.plan import make_plan, plan_devices, planned_rows
from zo_finetuner.plan_report import as_json, report, verdict
from zo_finetuner.scale_net import ScaleNet

# What decides shapes in the published config.json files.
LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, hidden_act="silu", rms_norm_eps=1e-5, attention_bias=False,
    mlp_bias=False, torch_dtype="bfloat16", bos_token_id=128000, eos_token_id=128001,
)
PUBLISHED = {
    "llama-3.2-1b": (1_235_814_400, LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True)),
    "llama-3.1-8b": (8_030_261_248, LLAMA | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False)),
    "opt-30b": (29_974_540_288, dict(
        architectures=["OPTForCausalLM"], model_type="opt", vocab_size=50272, hidden_size=7168, ffn_dim=28672,
        num_hidden_layers=48, num_attention_heads=56, word_embed_proj_dim=7168, max_position_embeddings=2048,
        do_layer_norm_before=True, activation_function="relu", torch_dtype="float16", bos_token_id=2, eos_token_id=2,
        pad_token_id=1)),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name, (_, config) in PUBLISHED.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_counted_as_published(published, name):
    model = empty_model(str(published / name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][0]
    assert all(p.is_meta for p in model.parameters()) and all(b.is_meta for b in model.buffers())


def allocations(run):
    """What `run` returns, and the sizes that it took and gave back (negative), from the allocator's own events."""
    gc.collect()  # a tensor from before that dies meanwhile would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, [size for _, size in sorted(events, key=lambda event: event[0])]


def peak_bytes(run):
    """The largest sum of tensor memory that `run` had above what was there before."""
    return max(accumulate(allocations(run)[1], initial=0))


SMALL = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=704, num_key_value_heads=2, tie_word_embeddings=True),
    "opt": OPTConfig(**SMALL, ffn_dim=1024, word_embed_proj_dim=256),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    CONFIGS[request.param].save_pretrained(path)
    return path


def measured_steps(folder, plan, rows):
    """Peak bytes of the first step and of the second, weights and batch aside; and how many blocks there are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=plan.dtype).eval()
    method = make_method(plan.optimizer, model, batch_size=plan.batch)
    engine = Engine(model, method, probing=plan.probing)
    batch = collate(rows, 0, packed=True)

    def step():
        total, weight = training_loss(model, batch)
        return total / weight

    peaks = [peak_bytes(lambda: engine.step(step, 1e-6)) for _ in range(2)]
    assert not getattr(engine.probing, "reason", ""), engine.probing.reason
    return *peaks, len(engine.blocks)


@pytest.mark.parametrize("task", ["sst2", "squad", "squad in slices"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("probing", ["inplace", "scratch", "paired"])
def test_a_step_takes_the_predicted_memory(cpu, folder, task, dtype, probing, monkeypatch):
    task, _, sliced = task.partition(" ")
    if sliced:
        monkeypatch.setattr(slices, "LEAST", 0)
    plan = make_plan(str(folder), task=task, batch=8, seq=64, dtype=dtype, probing=probing, optimizer="zo-finetuner")
    m = plan.memory
    first, later, blocks = measured_steps(folder, plan, planned_rows(task, 8, 64))
    # Besides what is predicted: seeds, coefficients and losses (0-dim, 8 bytes or less, under 100 of them), and per
    # block at most four fp32 numbers (a threshold, a scale, and the two while they are made).
    slack = 800 + 16 * blocks
    assert 0 <= later - max(m.activations, m.logits) <= slack
    if probing != "paired":  # the rehearsal in its first step makes copies that are not predicted
        assert 0 <= first - (m.peak - m.weights - m.method - m.tables) <= slack


@pytest.mark.parametrize("name", BUILDERS)
def test_any_architecture_is_traced_to_the_byte(cpu, name, tmp_path):
    tiny(name).config.save_pretrained(tmp_path)
    plan = make_plan(str(tmp_path), batch=8, seq=32, probing="scratch", dtype="float32")
    first, later, blocks = measured_steps(tmp_path, plan, planned_rows("sst2", 8, 32))
    most = max(plan.memory.activations, plan.memory.logits)
    # As above; and where the peak is in attention (OPT), what torch's CPU kernel holds inside: fp32 scores of 32
    # queries and 32 keys, two numbers per query, a sum per query of 8 (the head's width).
    slack = 800 + 16 * blocks + 4 * 32 * (32 + 2 + 8)
    assert 0 <= later - most <= slack
    assert 0 <= first - plan.memory.scratch - most <= slack


@pytest.mark.parametrize("task", ["sst2", "squad"])
def test_learning_takes_the_predicted_memory(cpu, folder, task):
    """A meta step of the improved recipe in fp32, whatever dtype the plan is for: never above, and below by no more
    than the two gradients of the tied embedding, which need not be there while the logits are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = make_plan(str(folder), task=task, batch=8, seq=64, dtype="bfloat16")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    weights, batch = Weights(model), collate(planned_rows(task, 8, 64), 0, packed=True)
    names, numels = weights.blocks.names, weights.blocks.numels
    recipe = ImprovedRecipe(weights, ScaleNet.fresh(names, numels), torch.ones(len(names)), window=20, costs=[Mean()])

    def loss():
        total, weight = training_loss(model, batch)
        return total / weight

    def meta_step(k):
        recipe.step(Turn(loss, 0, History.start(len(names)), k, 0.0))

    for k in range(WARM + 1):
        meta_step(k)
    peak = peak_bytes(lambda: meta_step(99))
    predicted = plan.memory.learning - sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *batch.values()))
    assert predicted - 2 * 4 * max(numels) < peak <= predicted + 100_000  # networks and numbers per block


def test_the_operations_of_a_forward(published):
    """Two per multiply-add: products of the layers, scores and weighted sums, two head rows at one place."""
    plan = make_plan(str(published / "llama-3.2-1b"), batch=1, seq=64, probing="inplace")
    layer = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192
    one = 2 * 16 * (64 * layer + 2 * 64 * 64 * 2048) + 2 * 2 * 2048
    assert plan.work.flops == 2 * one


def test_a_step_moves_what_the_passes_read_and_write(published):
    numel, embedding = 1_235_814_400, 128256 * 2048
    tokens, layers, rows = 16 * 64, numel - 128256 * 2048, 2
    path = str(published / "llama-3.2-1b")
    copies = 2 * (layers + tokens * 2048 + rows * 2048)  # bytes of one sign's perturbed weights
    scratch = make_plan(path, batch=16, seq=64, probing="scratch").work
    assert scratch.moved == 2 * 2 * copies + 2 * 2 * numel and scratch.read == 2 * copies
    inplace = make_plan(path, batch=16, seq=64, probing="inplace", optimizer="zo-finetuner").work
    assert inplace.moved == 3 * 2 * 2 * numel + 2 * numel
    assert embedding > tokens * 2048


@pytest.mark.parametrize("task", ["sst2", "squad"])
@pytest.mark.parametrize(("name", "most"), [("llama-3.2-1b", 1.05), ("opt-30b", 1.02)])
def test_the_largest_models_keep_to_the_memory_of_inference(published, name, most, task):
    plan = make_plan(str(published / name), task=task, batch=16, seq=32, optimizer="zo-finetuner")
    m, numel = plan.memory, plan.parameters
    assert plan.probing == "scratch" and 1 < m.ratio <= most
    assert m.weights - 2 * numel < 1e-4 * numel
    largest = {"llama-3.2-1b": 2048 * 8192 * 2, "opt-30b": (7168 * 28672 + 28672) * 2}[name]
    assert m.scratch == largest
    assert (m.gradients, m.moments) == (2 * numel, 12 * numel) and m.adam > 8 * m.inference


def test_a_large_head_is_read_in_slices(published, monkeypatch):
    """As many products and bytes as the whole head takes, in the scratch of the largest other matrix."""
    sliced = make_plan(str(published / "llama-3.2-1b"), task="squad", batch=2, seq=16, probing="scratch")
    monkeypatch.setattr(slices, "LEAST", 128256 * 2048)
    whole = make_plan(str(published / "llama-3.2-1b"), task="squad", batch=2, seq=16, probing="scratch")
    assert sliced.memory.scratch == 2048 * 8192 * 2
    assert whole.largest == "model.embed_tokens.weight" and whole.memory.scratch == 128256 * 2048 * 2
    assert whole.memory.logits > 3 * 16 * 128256 * 4  # fp32 logits and their log-softmax, 16 places in three sequences
    assert sliced.memory.logits < whole.memory.logits / 10
    assert (sliced.work.flops, sliced.work.moved) == (whole.work.flops, whole.work.moved)


def test_paired_probes_hold_two_copies_and_twice_the_batch(folder):
    one, two = (make_plan(str(folder), batch=8, seq=16, probing=p, dtype="float32") for p in ("scratch", "paired"))
    assert two.memory.scratch == 2 * one.memory.scratch
    assert 1.9 < two.memory.activations / one.memory.activations < 2.5
    assert (one.work.forwards, two.work.forwards) == (2, 1)
    assert two.work.flops == pytest.approx(one.work.flops, rel=0.01)
    assert two.work.moved < one.work.moved
    assert one.memory.inference == two.memory.inference


@pytest.mark.parametrize(
    ("name", "settings", "per_weight", "forwards"),
    [
        ("mezo", {}, 0, 2),
        ("zo-momentum", {}, 4, 2),
        ("zo-adam", {}, 8, 2),
        ("zo-adamm", {}, 12, 2),
        ("hizoo", {}, 4, 3),
        ("ldsd-sgd", {}, 4, 6),
        ("ldsd-adamm", {"mean_dtype": "bfloat16"}, 14, 6),
        ("es", {"probes": "4"}, 0, 4),
        ("forward-grad", {}, 2, 2),
    ],
)
def test_a_methods_state_and_forwards_are_counted(folder, name, settings, per_weight, forwards):
    plan = make_plan(str(folder), batch=2, seq=16, dtype="bfloat16", optimizer=name, settings=settings)
    small = 100 * plan_blocks(folder)  # a few numbers per block
    assert per_weight * plan.parameters <= plan.memory.method <= per_weight * plan.parameters + small
    assert plan.work.forwards == forwards
    one = make_plan(str(folder), batch=2, seq=16, dtype="bfloat16")
    assert plan.work.flops == pytest.approx(forwards / 2 * one.work.flops)
    if name == "zo-adam":  # it reads and writes two fp32 states in the update's pass
        assert plan.work.moved - one.work.moved == 2 * 8 * plan.parameters


def plan_blocks(folder):
    return len(trainable_blocks(empty_model(str(folder), "bfloat16")))


def test_a_scratch_only_method_is_planned_so(folder):
    assert make_plan(str(folder), batch=2, seq=16, dtype="float32", optimizer="dizo").probing == "scratch"
    with pytest.raises(InputError, match="probing inplace does not go with this method: a projection"):
        make_plan(str(folder), batch=2, seq=16, dtype="float32", optimizer="dizo", probing="inplace")
    model = empty_model(str(folder), "float32")
    anchors = sum(p.nbytes for name, p in model.named_parameters() if "k_proj" in name or "v_proj" in name)
    dizo = make_plan(str(folder), batch=2, seq=16, dtype="float32", optimizer="dizo").memory.method
    assert anchors <= dizo < anchors + 100 * plan_blocks(folder)  # the weights are not its own
    paired = make_plan(str(folder), batch=2, seq=16, dtype="float32", optimizer="hizoo", probing="paired")
    assert paired.work.forwards == 2  # its centre, and both signs in one


def test_what_fits_and_how_long_it_takes():
    h200 = find_device("h200")
    assert h200.flops(torch.bfloat16) == 989e12 * 0.6 and h200.flops(torch.float32) == 67e12 * 0.6
    assert h200.bytes == pytest.approx(4.3e12, rel=0.01)  # a device copy was measured at that
    assert h200.holds(130 << 30) and not h200.holds(139 << 30)
    assert described("NVIDIA A100-SXM4-40GB", 39.4).bandwidth == find_device("A100 40GB").bandwidth
    assert described("NVIDIA H100 80GB HBM3", 79.1).half == find_device("H100").half
    assert described("NVIDIA H100 PCIe", 79.1).half == find_device("H100 PCIe").half
    assert described("NVIDIA GeForce RTX 4090", 23.5) == Device("NVIDIA GeForce RTX 4090", 23.5, 165, 82.6, 1008)
    unknown = described("Imaginary X", 10.0)
    assert unknown.bandwidth == 0 and unknown.holds(5 << 30)
    with pytest.raises(InputError, match="h300"):
        find_device("h300")


def test_the_cpu_is_timed_where_it_is(cpu):
    device = probe_cpu(torch.float32, tokens=64, width=128)
    assert device.measured and device.memory > 0.1
    assert math.isfinite(device.half) and device.half > 0 and device.bandwidth > 0
    assert device.flops(torch.float32) == device.single * 1e12 and device.bytes == device.bandwidth * 1e9


def test_the_verdict_comes_first_and_the_json_holds_the_same_numbers(folder, capsys):
    flags = ["plan", "--model", str(folder), "--batch", "4", "--seq", "16"]
    assert main([*flags, "--device", "H200"]) == 0
    text = capsys.readouterr().out
    plan = make_plan(str(folder), batch=4, seq=16, graphs=True)  # as zo train runs on a GPU
    devices = plan_devices(plan, "h200")
    assert text == report(plan, devices) + "\n"
    assert text.splitlines()[0] == verdict(plan, devices)
    assert text.startswith("predicted: fits H200 (139.8 GiB): peak ")
    assert max(len(line) for line in text.splitlines() if line != str(folder)) <= 120

    assert main([*flags, "--device", "H200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(as_json(plan, devices)))
    entry = as_json(plan, devices)
    assert entry["predicted"] is True and entry["memory"]["peak"] == plan.memory.peak
    only = entry["devices"][0]
    assert only["step_s"] == only["forwards_s"] + only["passes_s"] > 0

    assert main([*flags, "--device-memory", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("predicted: does NOT fit a device (0.5 GiB)")  # its context alone is 0.8
    if not torch.cuda.is_available():
        assert main(flags) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith(", ".join(device.name for device in GPUS))


def test_graphs_hold_what_a_step_takes(folder, capsys):
    """Beside the eager first step of a shape, which takes as much outside their pool."""
    m = make_plan(str(folder), batch=4, seq=16, dtype="bfloat16", graphs=True).memory
    assert m.pool == max(m.activations, m.logits) > 0
    later = m.scratch + 2 * m.pool
    assert m.peak == m.weights + m.method + m.tables + max(later, m.first)
    for flags, counted in ((["--device", "cpu"], False), (["--no-graphs"], False), (["--device", "h100"], True)):
        assert main(["plan", "--model", str(folder), "--batch", "4", "--seq", "16", "--json", *flags]) == 0
        assert (json.loads(capsys.readouterr().out)["memory"]["pool"] > 0) == counted


BAD = [
    (["--model", "./nowhere"], ("no such folder",)),
    (["--model", "nobody/nothing-at-all"], ("nobody/nothing-at-all", "cannot be built from its config")),
    (["--dtype", "float8"], ('unknown dtype "float8"', "bfloat16")),
    (["--device", "h300"], ('unknown device "h300"', "H200")),
    (["--device", "h200", "--device-memory", "3"], ("not both",)),
    (["--device-memory", "-3"], ("device_memory must be positive",)),
    (["--task", "sst3"], ('"sst3"', '"sst2"')),
    (["--optimizer", "mezzo"], ('did you mean "mezo"',)),
    (["--probing", "pair"], ('did you mean "paired"',)),
    (["--batch", "0"], ("batch must be at least 1",)),
    (["--seq", "0"], ("seq must be at least 1",)),
    (["--seq", "129"], ("seq 129 exceeds the 128 positions",)),
    (["--option-tokens", "65"], ("option_tokens 65 exceeds seq 64",)),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(folder, capsys, bad, words):
    assert main(["plan", "--model", str(folder), "--seq", "64", *bad]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("zo: error: ")]
    assert out == "" and len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_faults_in_a_config_are_one_line(tmp_path, capsys):
    for config, word in (
        ("{", "not JSON"),
        ('{"model_type": "no-such-thing"}', "no-such-thing"),
        ('{"model_type": "t5"}', "T5Config"),
        (json.dumps(LLAMA | dict(quantization_config={"quant_method": "gptq", "bits": 4})), "quantised"),
    ):
        (tmp_path / "config.json").write_text(config)
        assert main(["plan", "--model", str(tmp_path)]) == 2
        assert word in capsys.readouterr().err


def test_a_model_that_needs_values_is_one_line(folder, capsys, monkeypatch):
    def needs_values(*_, **__):
        raise RuntimeError("cannot index with a meta tensor\n  somewhere")

    monkeypatch.setattr("zo_finetuner.prediction.trace_loss", needs_values)
    assert main(["plan", "--model", str(folder), "--seq", "16"]) == 2
    assert "cannot be followed by its shapes alone (RuntimeError: cannot index with a meta tensor)" in (
        capsys.readouterr().err
    )
