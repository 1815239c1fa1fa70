"""The whole of gpu_check on the CPU: its CUDA calls through a layer that is replaced here."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, operations
from benchmarks.gpu_check import CPU_SIZES, FAILED, OK, SKIPPED, Context, Cpu, attempt


class Fake(Cpu):
    """A CPU that says it has streams, graphs and memory."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def free_bytes(self) -> int:
        return 1 << 40

    @contextlib.contextmanager
    def other_stream(self):
        self.calls.append("stream")
        yield

    def capture(self, run):
        self.calls.append("capture")
        results = run()

        def replay() -> None:
            self.calls.append("replay")
            for old, new in zip(results, run(), strict=True):
                old.copy_(new)

        return results, replay


def context(gpu: Cpu | None = None, seconds: float = 600.0) -> Context:
    return Context(gpu or Fake(), CPU_SIZES, time.monotonic() + seconds, compile=False)


def main(folder: Path, *options: str, gpu: Cpu | None = None) -> tuple[int, dict]:
    command = ["--device", "cpu", "--in-process", "--no-compile", "--output", str(folder)]
    status = gpu_check.main([*command, *options], gpu)
    return status, json.loads((folder / "gpu_check.json").read_text())["sections"]


def test_every_section_runs_and_reports(tmp_path):
    fake = Fake()
    status, sections = main(tmp_path, gpu=fake)
    assert status == 0
    assert list(sections) == list(gpu_check.SECTIONS)
    found = {(row["check"], row["backend"], row["status"]) for row in sections["modes"]}
    assert ("layer_norm, a CUDA graph", "native", OK) in found
    assert ("layer_norm, a second device", "native", SKIPPED) in found
    assert {"stream", "capture", "replay"} <= set(fake.calls)
    assert {row["dtype"] for row in sections["values"] if row["status"] == OK} == {
        *("float16", "bfloat16", "float32", "float64")
    }
    assert all(row["max_ulp"] >= 0 for row in sections["values"] if row["status"] == OK)
    copies = [row for row in sections["timings"] if row["provider"] == "copy"]
    ours = [row for row in sections["timings"] if row["provider"] == "gn_kernels"]
    assert len(ours) == len(copies) == 18
    assert all(row["over_copy"] > 0 and row["over_eager"] > 0 for row in ours)
    assert all(row["over_natural"] > 0 for row in sections["steps"])
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {name}: " in page for name in gpu_check.SECTIONS)


def test_what_only_cuda_has_is_skipped_with_the_reason(tmp_path):
    _, sections = main(tmp_path, "--section", "modes", "--section", "sanitizer")
    reasons = {row["check"]: row["detail"] for row in sections["modes"]}
    assert reasons["gelu, another stream"] == "needs CUDA: streams"
    assert reasons["gelu, a CUDA graph"] == "needs CUDA: graphs"
    assert reasons["gelu, transposed and shifted memory"] == ""
    assert sections["sanitizer"][0]["detail"] == "needs CUDA"


@pytest.fixture
def wrong_gelu(monkeypatch):
    make = operations.make_operation

    def wrong(name, *arguments, **options):
        operation = make(name, *arguments, **options)
        if name != "gelu":
            return operation
        ours = operation.ours
        return operation._replace(ours=lambda x: ours(x) + 0.1 * x)

    monkeypatch.setattr(operations, "make_operation", wrong)


def test_a_wrong_kernel_fails_and_has_no_speed(wrong_gelu, tmp_path):
    status, sections = main(tmp_path, "--section", "values", "--section", "timings")
    assert status == 1
    for rows in sections.values():
        failed = {row["check"] for row in rows if row["status"] == FAILED}
        assert failed == {"gelu"}
    (row, *_) = (row for row in sections["timings"] if row["status"] == FAILED)
    assert "wrong by" in row["detail"]
    assert "median_ms" not in row


def test_a_graph_that_replays_old_results_is_seen(tmp_path):
    class Stale(Fake):
        def capture(self, run):
            return run(), lambda: None

    status, sections = main(tmp_path, "--section", "modes", gpu=Stale())
    assert status == 1
    assert {row["check"] for row in sections["modes"] if row["status"] == FAILED} == {
        f"{name}, a CUDA graph" for name in ("gelu", "layer_norm", "attention")
    }


def test_a_broken_section_loses_neither_its_rows_nor_the_others(monkeypatch, tmp_path):
    def broken(context):
        yield attempt(context, {"check": "first"}, dict)
        raise RuntimeError("no such device\nand more")

    monkeypatch.setitem(gpu_check.SECTIONS, "penalty", broken)
    status, sections = main(tmp_path, "--section", "penalty", "--section", "large", gpu=Fake())
    assert status == 1
    assert [row["status"] for row in sections["penalty"]] == [OK, FAILED]
    assert "no such device" in sections["penalty"][1]["detail"]
    assert {row["status"] for row in sections["large"]} == {OK}


def test_time_that_is_up_skips(tmp_path):
    status, sections = main(tmp_path, "--minutes", "0")
    assert status == 0
    assert {row["detail"] for rows in sections.values() for row in rows} == {"out of time"}
    rows = list(gpu_check.timings(context(seconds=-1)))
    assert {row["status"] for row in rows} == {SKIPPED}


def test_a_lack_of_memory_skips_and_frees():
    class Counting(Fake):
        def empty_cache(self) -> None:
            self.calls.append("freed")

    def check():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    fake = Counting()
    row = attempt(context(fake), {"check": "big"}, check)
    assert row["status"] == SKIPPED
    assert fake.calls == ["freed"]
    sizes = CPU_SIZES._replace(large=2**31 + 5)
    small = type("Small", (Fake,), {"free_bytes": lambda self: 1 << 30})()
    (row,) = gpu_check.large(context(small)._replace(sizes=sizes))
    assert row["status"] == SKIPPED
    assert "21 GB of free memory" in row["detail"]


def test_wrong_elements_far_out_are_seen():
    x = torch.randn(9000).to(torch.bfloat16)
    y = x.clone()
    assert gpu_check._wrong_piece(x, y, lambda value: value) == ""
    y[-1] += 1
    assert "off by 1.0" in gpu_check._wrong_piece(x, y, lambda value: value)


@pytest.mark.parametrize(("status", "problem"), [(0, ""), (-11, "ended with -11"), (None, "ran")])
def test_a_process_that_dies_keeps_its_rows(status, problem, monkeypatch):
    def run(command, **options):
        folder = Path(command[command.index("--output") + 1])
        rows = [{"check": "first", "status": OK, "detail": ""}]
        (folder / "gpu_check.json").write_text(json.dumps({"sections": {"values": rows}}))
        if status is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, status, "", "an illegal memory access")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    first, *others = gpu_check.run_isolated("values", [], 10.0)
    assert first["status"] == OK
    assert [problem in row["detail"] for row in others] == ([True] if problem else [])


@pytest.mark.parametrize(
    ("status", "expected"), [(0, OK), (1, FAILED), (9, FAILED), (None, SKIPPED)]
)
def test_the_sanitizer(status, expected, monkeypatch):
    def run(command, **options):
        assert command[0] == "/tools/compute-sanitizer"
        if status is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(
            command, status, "========= Invalid __global__ write", ""
        )

    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/tools/{name}")
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    fake = type("Gpu", (Fake,), {"name": "cuda"})()
    (row,) = gpu_check.sanitizer(context(fake))
    assert row["status"] == expected
    assert status != 9 or "Invalid __global__ write" in row["detail"]


def test_a_machine_without_a_gpu_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("has one")
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--device cpu" in capsys.readouterr().err


def test_what_the_layer_calls_exists():
    # On a machine without a GPU nothing else would notice a misspelt name.
    source = Path(gpu_check.__file__).read_text()
    for name in set(re.findall(r"torch\.cuda\.(\w+)", source)):
        assert hasattr(torch.cuda, name), name
    assert Cpu.__dict__.keys() >= {
        name for name in gpu_check.Cuda.__dict__ if not name.startswith("_")
    }


@pytest.mark.slow
def test_a_section_in_a_process_of_its_own(tmp_path):
    status = gpu_check.main(
        ["--device", "cpu", "--section", "large", "--output", str(tmp_path), "--minutes", "2"]
    )
    assert status == 0
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["sections"]["large"]
    assert rows[0]["status"] == OK
