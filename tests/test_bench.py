import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minisaobp import bench, bench_cost, bench_gpu, bench_text, cli


def test_contestants_take_turns():
    calls = []
    seconds = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 5 and [len(s) for s in seconds.values()] == [3, 3]  # two turns to warm up
    assert bench.summary([1.0, 2.0, 3.0]) == {"median": 2.0, "quartiles": [1.0, 3.0]}


def test_bench_bp_measures_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "STREAMING", (256, 8))
    bench.bench_bp(tmp_path / "bp.json")
    results = json.loads((tmp_path / "bp.json").read_text())
    assert results["refinement"]["refine"]["median"] > 0 and np.isfinite(results["streaming"]["peak_megabytes"])
    assert results["algorithm1"]["seconds"] > results["algorithm1"]["seconds_refine"]
    printed = capsys.readouterr().out
    assert "Floor" in printed and f"Wrote {tmp_path}" in printed


def test_bench_text_measures_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_text, "STEPS", 3)
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(f"Sentence {n} says that {n * n} is the square of {n}." for n in range(300)))
    bench_text.bench_text(tmp_path / "text.json", [path])
    results = json.loads((tmp_path / "text.json").read_text())
    assert results["corpus"] == ["own.txt"] and results["words"] == 300 * 10 + 299 * 2
    assert results["WordPiece"]["tokens"] > 1000 < results["byte-level BPE"]["tokens"]
    assert 0 < results["pipeline"]["share"] < 1 and "A masked batch of 16 x 64" in capsys.readouterr().out


def test_bench_cost_measures_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_cost, "SIZES", {"cpu": {"bert-mini": (1, 2)}})
    monkeypatch.setattr(bench_cost, "VOCABULARY", 300)
    monkeypatch.setattr(bench_cost, "LENGTH", 16)
    bench_cost.bench_cost(tmp_path / "cost.json", np)
    rows = json.loads((tmp_path / "cost.json").read_text())["sizes"]["bert-mini"]
    assert list(rows["training"]) == list(bench_cost.ARMS) and list(rows["inference"]) == list(bench_cost.ARMS)[:4]
    assert all(row["median"] > 0 for what in ("training", "inference") for row in rows[what].values())
    assert "inference      elemmul" in capsys.readouterr().out


def test_bench_cost_where_there_may_be_a_gpu_takes_the_processor_if_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("CUPY_TF32", "0")
    calls = []
    monkeypatch.setattr(bench_cost, "bench_cost", lambda *args: calls.append(args))
    cli.main(["bench", "cost", "--device", "auto", "--out", str(tmp_path)])
    assert calls == [(tmp_path / "cost.json", np)]


def test_an_option_of_another_benchmark_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "cost", "--corpus", "x", "--out", str(tmp_path)])
    assert "argument --corpus: only of text" in capsys.readouterr().err
    for what in ("gpu", "bp"):
        with pytest.raises(SystemExit):
            cli.main(["bench", what, "--device", "cpu", "--out", str(tmp_path)])
        assert "argument --device: only of cost" in capsys.readouterr().err


def test_bench_gpu_measures_ours_before_pytorch_and_leaves_it_the_memory(tmp_path, monkeypatch):
    calls = []

    def noted(name, result):
        return lambda *_: calls.append(name) or result

    row = {"median": 1.0, "quartiles": [1.0, 1.0], "megabytes": 1.0}
    ours = {"minisaobp, original": row, "minisaobp, high": row}
    pieces = {"_our_steps": ours, "_kernels": {}, "_peers": ("torch", None), "_refinement": {}, "_their_steps": {}}
    for name, result in pieces.items():
        monkeypatch.setattr(bench_gpu, name, noted(name, result))
    properties = {
        "getDeviceProperties": lambda _: {"name": b"some"},
        "driverGetVersion": lambda: 1,
        "runtimeGetVersion": lambda: 1,
    }
    xp = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(**properties)), __version__="14")
    xp.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=noted("free", None))
    bench_gpu.bench_gpu(tmp_path / "gpu.json", xp)
    wanted = ["_our_steps"] * 2 + ["_kernels", "_peers"] + ["_refinement"] * 2 + ["free"] + ["_their_steps"] * 2
    assert calls == wanted
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["bert-mini 128x128"] == ours


def test_steps_are_printed_with_their_ratios_to_pytorch(capsys):
    def row(median):
        return {"median": median, "quartiles": [median, median], "megabytes": 1.0}

    rows = {"minisaobp, original": row(2.0), "minisaobp, high": row(3.0)}
    bench_gpu._print_steps("some", 1, 2, rows)
    assert "PyTorch" not in capsys.readouterr().out
    peers = {"eager, original": 4.0, "compiled, original": 1.0, "eager, high": 6.0, "compiled, high": 2.0}
    bench_gpu._print_steps("some", 1, 2, rows | {f"PyTorch {name}": row(median) for name, median in peers.items()})
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "minisaobp, original" in line).endswith(
        "  0.50 of PyTorch eager  2.00 of PyTorch compiled"
    )
    assert next(line for line in lines if "minisaobp, high" in line).endswith(
        "  0.50 of PyTorch eager  1.50 of PyTorch compiled"
    )
    assert lines[-1] == "high: 1.500 times original (taking turns)"


def test_a_pytorch_that_cannot_be_compared_with_is_not_and_says_why(monkeypatch, capsys):
    no_gpu = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), __version__="2.9+cpu")
    for torch, reason in ((None, "import of torch halted"), (no_gpu, "PyTorch 2.9+cpu finds no GPU")):
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace())
        assert bench_gpu._peers() == (None, None)
        assert reason in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="GPU machines run Linux")
@pytest.mark.parametrize("checks_fail", [False, True])
def test_the_script_of_a_gpu_machine(tmp_path, checks_fail):
    root = Path(__file__).parents[1]
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$PWD" "$@"\nexit {5 if checks_fail else 0}\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = [root / "tests" / "gpu" / "run", "here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = [f"{root} -m pytest tests/gpu -rs"]
    if not checks_fail:
        lines += [f"{root} -m minisaobp bench {what} --out {tmp_path}/here" for what in ("gpu", "cost --device gpu")]
    assert (done.stdout.splitlines(), done.returncode) == (lines, 5 if checks_fail else 0)
