"""finetune, evaluate --task and data check as a person meets them, on small files in the official formats."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from minisaobp.nn import Bert, Config, Gpt2, from_pretrained
from minisaobp.text.tokenizer import train_bpe, train_wordpiece
from tests.command_line import CUDARuntimeError, run
from tests.text.task_fixtures import CONTEXT, choices, glue, squad, write

WORDS = [
    ("x", f"{CONTEXT} a fine and funny film good , warm wise dull lifeless mess bad in every way cat dog boat " * 3)
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data, an encoder and a decoder, and a run on SST-2."""
    folder = tmp_path_factory.mktemp("finetune")
    choices(glue(folder / "data"))
    for name in ("train", "dev"):
        squad(folder / f"data/squad-v1.1/{name}-v1.1.json")
    rng = np.random.default_rng(0)
    for name, kind, tokenizer in (
        ("encoder", Bert, train_wordpiece(WORDS, 200)),
        ("decoder", Gpt2, train_bpe(WORDS, 300)),
    ):
        model_type = {"encoder": "bert", "decoder": "gpt2"}[name]
        size = tokenizer.get_vocab_size()
        config = Config(size, 16, 2, 2, 32, 64, model_type=model_type, attention_variant="high", initializer_range=0.1)
        kind.initialise(config, rng).save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text(tokenizer.to_str())
    done = finetune(folder, "sst2", "--epochs", 4, "--rate", "1e-2", "--batch", 8)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


def finetune(folder, task, *more, out=None):
    arguments = ["--task", task, "--data", folder / "data", "--checkpoint", folder / "encoder"]
    return run("finetune", *arguments, "--out", out or folder / "runs" / task, *more)


@pytest.mark.parametrize("error", [MemoryError, CUDARuntimeError])
def test_too_little_memory_is_one_line_and_leaves_the_checkpoint(here, tmp_path, monkeypatch, error):
    full_at = iter([False, False, True])  # of each step, whether it wants too much
    real = Bert.loss_and_gradients

    def loss_and_gradients(*arguments, **options):
        if next(full_at):
            raise error("cudaErrorMemoryAllocation: out of memory")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Bert, "loss_and_gradients", loss_and_gradients)
        done = finetune(here, "sst2", "--epochs", 1, "--batch", 8, out=tmp_path / "run")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "error: not enough memory for --batch 8 sequences: lower --batch" in line and "out of memory)" in line, line
    done = run("finetune", "--resume", tmp_path / "run", "--batch", 8)
    assert done.returncode == 0 and (tmp_path / "run" / "metrics.json").exists(), done.stderr


def test_sst2_learns_and_says_all(here):
    out = here / "runs/sst2"
    record = json.loads((out / "metrics.json").read_text())
    # 40 x 4 sentences of four kinds: their words tell the label
    assert record["scores"]["dev"]["accuracy"] == 1.0 and record["majority"]["accuracy"] == 0.6
    assert record["splits"]["train"] == {
        "file": str(here / "data/glue/SST-2/train.tsv"), "examples": 160, "official_examples": 67349, "skipped": {},
        "sequences": 160, "cut": 0,
    }  # fmt: skip
    assert record["best"]["steps_per_epoch"] == 20 and record["missing_splits"] == []
    assert len(record["attention"]["gtd"]["layers"]) == 2 and record["attention"]["entropy"]["mean"] > 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 20, 40, 60, 80]
    assert record["best"]["step"] == next(line["step"] for line in lines if line["dev_score"] == 1.0)
    dev = (out / "predictions/dev/SST-2.tsv").read_text().splitlines()
    assert dev[:3] == ["index\tprediction", "0\t1", "1\t1"] and len(dev) == 11
    assert (out / "predictions/test/SST-2.tsv").read_text() == "index\tprediction\n0\t1\n1\t0\n" + dev_last(out)
    assert from_pretrained(out / "best").config.head == "classification"
    said = (here / "said").read_text()
    assert "SST-2 dev, 10 examples: accuracy 1.0000, score 1.0000; the same answer for all: 0.6000" in said
    assert "train: 160 examples" in said and "officially 67,349" in said


def dev_last(out):
    return (out / "predictions/test/SST-2.tsv").read_text().splitlines()[-1] + "\n"


@pytest.mark.parametrize(
    ("task", "metric", "file"),
    [
        ("cola", "matthews", "dev/CoLA.tsv"),
        ("stsb", "pearson", "dev/STS-B.tsv"),
        ("squad", "exact_match", "dev/predictions.json"),
        ("hellaswag", "accuracy", "dev/HellaSwag.jsonl"),
    ],
)
def test_every_kind_of_head_trains(here, task, metric, file):
    done = finetune(here, task, "--epochs", 1, "--length", 40)
    assert done.returncode == 0, done.stderr
    record = json.loads((here / "runs" / task / "metrics.json").read_text())
    assert metric in record["scores"]["dev"] and (here / "runs" / task / "predictions" / file).exists()
    again = run("evaluate", "--task", task, "--data", here / "data", "--checkpoint", here / "runs" / task,
                "--length", 40, "--out", here / "again" / task)  # fmt: skip
    assert again.returncode == 0, again.stderr
    found = json.loads((here / "again" / task / "metrics.json").read_text())
    assert found["scores"] == record["scores"]["dev"]
    assert found["attention"]["gtd"] == record["attention"]["gtd"]


def test_other_files_and_fewer_examples(here):
    race = here / "data/race-middle/dev.jsonl"
    done = finetune(here, "race", "--train", race, "--dev", race, "--epochs", 1, "--examples", 1, "--stride", 8)
    assert done.returncode == 0, done.stderr
    assert "1 training sequences, 1 steps, 1 in an epoch" in done.stdout and "Not there: test" in done.stdout
    lines = (here / "runs/race/predictions/dev/RACE.jsonl").read_text().splitlines()
    assert [json.loads(line)["idx"] for line in lines] == ["own1.txt-0", "own1.txt-1"]
    assert {json.loads(line)["label"] for line in lines} <= set("ABCD")


def test_skip_bad_counts_what_it_leaves_out(here, tmp_path):
    path = write(tmp_path / "train.tsv", "sentence\tlabel", "fine\t1", "wrong", "bad\t0", "worse\t7")
    refused_line = finetune(here, "sst2", "--train", path, out=tmp_path / "out")
    assert refused_line.returncode == 2 and not (tmp_path / "out").exists()
    assert f"argument --data: {path}, line 3: 1 columns, expected 2" in refused_line.stderr
    done = finetune(here, "sst2", "--train", path, "--skip-bad", "--epochs", 1, out=tmp_path / "out")
    assert done.returncode == 0 and "train: 2 examples" in done.stdout, done.stderr
    assert "SKIPPED 1 wrong columns, 1 label" in done.stdout
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    assert record["splits"]["train"]["skipped"] == {"wrong columns": 1, "label": 1}


def test_interrupted_it_goes_on_to_the_same_weights(here, tmp_path):
    arguments = ["--task", "sst2", "--data", here / "data", "--checkpoint", here / "encoder", "--epochs", "30"]
    command = [sys.executable, "-m", "minisaobp", "finetune", *map(str, arguments), "--out"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "loss" not in process.stderr.read(40):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"Go on with: python -m minisaobp finetune --resume {tmp_path / 'cut'}" in errors
    resumed = run("finetune", "--resume", tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "cut/last/model.safetensors").read_bytes() == (
        tmp_path / "whole/last/model.safetensors"
    ).read_bytes()
    scores = [json.loads((tmp_path / side / "metrics.json").read_text())["scores"] for side in ("cut", "whole")]
    assert scores[0] == scores[1]


def test_zero_shot(here, tmp_path):
    arguments = ["--data", here / "data", "--checkpoint", here / "decoder", "--zero-shot"]
    for task, chance in (("race", "0.2500"), ("hellaswag", "0.2500"), ("boolq", "0.5000")):
        done = run("evaluate", "--task", task, *arguments, "--out", tmp_path / task)
        assert done.returncode == 0, done.stderr
        each = r"accuracy [\d.]+ by the likelihood of each choice, [\d.]+ by its likelihood per token"
        assert re.search(rf"{each}; by chance {chance}", done.stdout), done.stdout
        record = json.loads((tmp_path / task / "metrics.json").read_text())
        assert record["complete"] and set(record["zero_shot"]) == {"likelihood", "likelihood_per_token"}
    few = run("evaluate", "--task", "boolq", *arguments, "--examples", 1)
    assert few.returncode == 0 and "1 examples, 0 of them cut to 64 tokens" in few.stdout


def test_a_fine_tuned_model_can_be_diagnosed(here, tmp_path):
    write(tmp_path / "own.txt", *["A fine film, she said."] * 20)
    arguments = ["diagnose", "--checkpoint", here / "runs/sst2", "--length", 16, "--out", tmp_path / "out"]
    done = run(*arguments, "--text", tmp_path / "own.txt")
    assert done.returncode == 0 and (tmp_path / "out/metrics.json").exists(), done.stderr
    without = run(*arguments)
    assert without.returncode == 2 and "argument --text: needed" in without.stderr


def test_data_check(here, tmp_path):
    done = run("data", "check", here / "data")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["SST-2", "dev", "10", "872", "NOT", "WHOLE", "glue/SST-2/dev.tsv"] in rows
    assert ["MNLI", "train", "-", "392,702", "not", "there"] in rows
    shutil.copytree(here / "data", tmp_path / "data")
    sst2 = tmp_path / "data/glue/SST-2"
    write(sst2 / "dev.tsv", "sentence\tlabel", "broken", *["fine\t1"] * 872)
    shutil.copy(sst2 / "train.tsv", sst2 / "train_subset.tsv")
    write(tmp_path / "data/wikitext-2/valid.txt", " = Title = ", *[" word " * 100] * 2154, " word " * 62)
    done = run("data", "check", tmp_path / "data")
    assert done.returncode == 2
    assert "1 damaged files in" in done.stderr.splitlines()[-1]
    assert f"DAMAGED: {sst2 / 'dev.tsv'}, line 2: 1 columns, expected 2" in done.stdout
    assert re.search(
        r"SST-2 +train_subset +160 +-  readable, not an official file  glue/SST-2/train_subset", done.stdout
    )
    assert re.search(r"wikitext-2 +valid +217,621 +217,646  NOT WHOLE", done.stdout)
    done = run("data", "check", tmp_path / "data", "--skip-bad")
    assert done.returncode == 0 and re.search(r"SST-2 +dev +872 +872  whole, 1 wrong columns", done.stdout)
    gone = run("data", "check", tmp_path / "nothing")
    assert gone.returncode == 2 and "argument DIR: expected a folder" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("finetune", r"the following arguments are required: --task, --data, --checkpoint, or --resume"),
        ("finetune --task sst3", "--task: invalid choice: 'sst3'"),
        ("finetune --task qqp --data data --checkpoint encoder", "--data: .*data has no QQP/train.tsv"),
        ("finetune --task sst2 --data gone --checkpoint encoder", "--data: .*gone has no SST-2/train.tsv"),
        ("finetune --task sst2 --data data --checkpoint decoder", "--checkpoint: expected an encoder"),
        ("finetune --task sst2 --data data --checkpoint gone", "--checkpoint: .*gone/config.json"),
        ("finetune --task sst2 --data data --checkpoint encoder --length 65",
         "--length: expected at most the model's 64 positions, got 65"),
        ("finetune --task sst2 --data data --checkpoint encoder --train empty.tsv",
         "--data: .*empty.tsv: an empty split, expected at least one example"),
        ("finetune --task sst2 --data data --checkpoint encoder --out run", "--out: 'run' holds a run"),
        ("finetune --resume run --epochs 9", "--epochs: expected that of the run, 4, got 9"),
        ("finetune --resume encoder", "--resume: encoder holds no checkpoint"),
        ("evaluate --task sst2 --checkpoint run", "--data: needed beside --task"),
        ("evaluate --checkpoint decoder --zero-shot", "--zero-shot: only beside --task"),
        ("evaluate --task sst2 --data data --checkpoint encoder",
         r"expected a model with the head 'classification' of 2 classes \(made by finetune\), encoder has"),
        ("evaluate --task mnli --data data --checkpoint run",
         "expected a model with the head 'classification' of 3 classes .*has the head 'classification' of 2"),
        ("evaluate --task sst2 --data data --checkpoint run --zero-shot",
         "--zero-shot: expected one of the tasks hellaswag, race, race-high, boolq, got sst2"),
        ("evaluate --task race --data data --checkpoint encoder --zero-shot",
         "--zero-shot: expected a decoder, encoder is an encoder"),
        ("evaluate --task sst2 --data data --checkpoint run --split test",
         "--split: expected one of train, dev of sst2, got 'test'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(here, tmp_path, monkeypatch, arguments, message):
    for name in ("data", "encoder", "decoder"):
        (tmp_path / name).symlink_to(here / name)
    (tmp_path / "run").symlink_to(here / "runs/sst2")
    write(tmp_path / "empty.tsv", "sentence\tlabel")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    done = run(*arguments.split())
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert sorted(os.listdir()) == before


def test_examples_that_have_changed_are_refused(here, tmp_path):
    shutil.copytree(here / "data/glue/SST-2", tmp_path / "SST-2")
    arguments = ["--task", "sst2", "--data", tmp_path, "--checkpoint", here / "encoder", "--epochs", 1]
    assert run("finetune", *arguments, "--out", tmp_path / "out").returncode == 0
    with open(tmp_path / "SST-2/train.tsv", "a") as file:
        file.write("one more\t1\n")
    done = run("finetune", "--resume", tmp_path / "out")
    assert done.returncode == 2 and "the examples are not those of the run" in done.stderr
    assert os.path.exists(tmp_path / "out/best")
