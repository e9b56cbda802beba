"""What the profiler and the `sass` case say about machine code, and the profiler's table and trace on the CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench import profile
from bench.__main__ import main
from bench.rows import read
from zo_kernels import why_unavailable

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from bench import predict  # noqa: E402
from bench.sass import CUOBJDUMP, Instruction, Kernel, accesses, offline  # noqa: E402

needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton wheel has no cuobjdump")


def code(*texts: str) -> list[Instruction]:
    return [Instruction(16 * i, text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IMAD.WIDE.U32 R2, R3, R4, R5", {"issue": 1, "imad": 2, "fma": 2}),
        ("IMAD.MOV.U32 R2, RZ, RZ, R4", {"issue": 1, "imad": 1, "fma": 1}),
        ("FFMA R2, R3, R4, R5", {"issue": 1, "fma": 1}),
        ("MUFU.LG2 R2, R3", {"issue": 1, "xu": 1}),
        ("LOP3.LUT R2, R3, R4, R5, 0x96, !PT", {"issue": 1, "alu": 1}),
        ("I2FP.F32.U32 R2, R3", {"issue": 1, "alu": 1}),
        ("F2FP.BF16.F32.PACK_AB R2, R3, R4", {"issue": 1, "alu": 1}),
        ("LDG.E.128 R4, [R2.64]", {"issue": 1, "lsu": 1}),
        ("UIADD3 UR4, UR4, 0x1, URZ", {"issue": 1}),
        ("BRA 0x100", {"issue": 1}),
        ("NOP", {}),
    ],
)
def test_every_instruction_has_its_unit(text, expected):
    assert dict(predict.units(Instruction(0, text))) == expected


def kernel(loops: list[list[Instruction]]) -> Kernel:
    return SimpleNamespace(loops=loops, registers=40, spills=lambda: [], instructions=loops[0])


def test_the_costliest_innermost_body_with_the_widest_loads_is_counted():
    """8 bf16 elements per 16-byte load; a loop around a body, a masked tail and a cheaper body do not count."""
    body = code("LDG.E.128 R4, [R2.64]", *["MUFU.SIN R1, R1"] * 16, "STG.E.128 [R2.64], R4", "BRA 0x0")
    cheaper = [Instruction(1000 + i, i_.text) for i, i_ in enumerate(code("LDG.E.128 R4, [R2.64]", "BRA 0x0"))]
    around = [*body, *(Instruction(500 + i, "FADD R1, R1, R1") for i in range(90))]
    tail = [Instruction(2000, "LDG.E.U16 R4, [R2.64]"), *(Instruction(2001 + i, "FADD R1, R1") for i in range(40))]
    found = predict.read_code("k", kernel([around, tail, cheaper, body]), itemsize=2)
    assert found.per_element == 19 / 8
    assert found.load["xu"] == pytest.approx(2 / 16 / predict.CLOCK)
    # 2 special functions an element at 16 lanes a clock: half the time of 4 bytes, so memory bounds it.
    assert found.busiest(4) == ("xu", pytest.approx(0.514, abs=1e-3)) and found.share(4) == 1
    assert found.share(1) == pytest.approx(1 / (4 * 0.5143), rel=1e-3)
    assert found.seconds(4) == pytest.approx(0.930e-12, rel=1e-3)
    assert found.seconds(1) == pytest.approx(2 / 16 / predict.CLOCK)


@needs_cuobjdump
def test_sass_rows_are_marked_as_predicted(tmp_path, capsys):
    assert main(["sass", "--quick", "--only", "perturb", "stats", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "sass.jsonl")
    assert {r["device"] for r in rows} == {"sm_90 (predicted)"} and {r["provider"] for r in rows} == {"triton"}
    value = {(r["case"], r["metric"]): r["p50"] for r in rows}
    assert len(value) == len(rows) == 2 * 4
    assert 14 < value["perturb", "instructions_per_element"] < 18 and value["perturb", "spills"] == 0
    assert 2 < value["stats", "instructions_per_element"] < 9
    assert 0 < value["perturb", "predicted_share"] <= 1 and 16 < value["perturb", "registers"] <= 255
    assert "of the bytes' time" in capsys.readouterr().out


@needs_cuobjdump
def test_a_profile_on_the_cpu_measures_and_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda tool: f"/bin/{tool}")
    words = ["--numel", "4096", "--device", "cpu", "--only", "perturb", "stats", "--out", str(tmp_path)]
    assert profile.main(words) == 0
    told = capsys.readouterr().out
    measured, predicted = told.split("PREDICTED from machine code for sm_90")
    for op, kernel in (("perturb", "axpy_kernel"), ("stats", "read_kernel")):
        assert f"\n{op} " in measured and kernel not in measured
        assert f"\n{op} " in predicted and kernel in predicted
    assert "MEASURED: " in measured and "not measured:" in predicted
    assert f"ncu --set full --clock-control none --target-processes all -o profile {profile.sys.executable}" in told
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("zo.perturb") == 3 and names.count("zo.stats") == 3
    assert profile.main([*words, "--once"]) == 0
    assert capsys.readouterr().out == ""


@needs_cuobjdump
def test_the_native_kernels_have_registers():
    if reason := why_unavailable("cuda"):
        pytest.skip(reason)
    assert {name for name, _, _ in predict.native_kernels()} == {"chunk_kernel", "block_kernel"}
    assert all(0 < registers <= 64 and local == 0 for _, registers, local in predict.native_kernels())


def test_an_unknown_op_of_a_profile_is_named(capsys):
    assert profile.main(["--numel", "64", "--device", "cpu", "--only", "twist"]) == 2
    assert capsys.readouterr().err.startswith("bench.profile: there is no op 'twist'; there are: perturb, update, ")


@needs_cuobjdump
def test_the_foils_read_16_bytes_at_a_time(tmp_path):
    """The roofline of reading must not be a slow kernel of ours, nor tl.randn's be slow for its loads."""
    from bench import foils

    with offline() as launches:
        foils.read(torch.empty(foils.CHUNK * 2), torch.empty(2, dtype=torch.int32))
        foils.randn([torch.empty(4096, dtype=torch.bfloat16)], torch.tensor(1.0))
    read_, randn = (Kernel(compiled, tmp_path) for _, compiled in launches)
    assert set(accesses(read_.instructions, "LDG")) == {16} and not read_.spills()
    assert 16 in accesses(randn.instructions, "LDG") and 16 in accesses(randn.instructions, "STG")
