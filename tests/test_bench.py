import json

import numpy as np
import pytest

from minisaobp import bench, bench_cost, bench_text, cli


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


def test_an_option_of_another_benchmark_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "cost", "--corpus", "x", "--out", str(tmp_path)])
    assert "argument --corpus: only of text" in capsys.readouterr().err
