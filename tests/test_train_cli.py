"""train, evaluate and generate as a person meets them."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from minisaobp.commands import pretrain
from minisaobp.training.adamw import AdamW
from minisaobp.training.checkpoint import write_checkpoint
from tests.command_line import CUDARuntimeError, refused, run, run_alone
from tests.training.test_training import model_of

SMALL = ["--layers", "2", "--width", "16", "--heads", "2", "--length", "16", "--batch", "4", "--steps", "6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One encoder and one decoder, trained for six steps."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "own.txt"
    text.write_text("\n\n".join(f"Sentence {n} says that {n * n} is the square of {n}." for n in range(400)))
    rival = ["--regulariser", "entropy", "--regulariser-strength", "0.01"]
    for kind, more in (("encoder", ["--variant", "high", "original", "--learn-lam", "head", *rival]), ("decoder", [])):
        done = run(
            "train", *SMALL, "--corpus", text, "--model", kind, *more, "--vocabulary", 300, "--out", folder / kind
        )
        assert done.returncode == 0, done.stderr
        assert "Best held-out loss" in done.stdout and str(folder / kind / "best") in done.stdout
    return folder


def test_train_records_what_was_asked_for(runs):
    record = json.loads((runs / "encoder" / "run.json").read_text())
    assert record["options"]["variant"] == ["high", "original"] and record["options"]["steps"] == 6
    assert record["environment"]["numpy"] and record["device"] == "cpu" and record["corpus"]["training_sequences"] > 0
    described = json.loads((runs / "encoder" / "best" / "config.json").read_text())
    assert described["attention_variant"] == ["high", "original"] and described["learn_lam"] == "head"
    lines = [json.loads(line) for line in (runs / "encoder" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]


@pytest.mark.parametrize(
    "error", [MemoryError("no 8 bytes"), CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")]
)
def test_too_little_memory_is_one_line_with_what_to_lower(runs, monkeypatch, error):
    def halted(*_):
        raise error

    monkeypatch.setattr("minisaobp.training.loop.evaluate", halted)
    done = run("evaluate", "--checkpoint", runs / "encoder", "--batch", 7)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"not enough memory for these sizes: lower --batch 7 or --length 16 ({error})" in done.stderr


def test_another_error_of_cuda_is_not_taken_for_too_little_memory(runs, monkeypatch):
    def halted(*_):
        raise CUDARuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    monkeypatch.setattr("minisaobp.training.loop.evaluate", halted)
    with pytest.raises(CUDARuntimeError):
        run("evaluate", "--checkpoint", runs / "encoder")


def test_evaluate_gives_what_the_run_logged(runs):
    for kind in ("encoder", "decoder"):
        lines = (runs / kind / "metrics.jsonl").read_text().splitlines()
        best = min(json.loads(line)["held_out_loss"] for line in lines)
        done = run("evaluate", "--checkpoint", runs / kind)
        assert done.returncode == 0, done.stderr
        assert f"loss {best:.4f} nats" in done.stdout and "perplexity" in done.stdout
        own = run("evaluate", "--checkpoint", runs / kind / "last", "--text", runs / "own.txt", "--length", 12)
        assert own.returncode == 0 and "sequences of 12 tokens" in own.stdout, own.stderr


def test_held_out_files_an_existing_tokenizer_and_perplexity_per_word(tmp_path, runs):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"It is said that {n * n} is not {n}." for n in range(50)))
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["sentence", "says", "that", "is", "the", "square", "of", "."],
    ]
    vocabulary += [f"{n}" for n in range(10)] + [f"##{n}" for n in range(10)]
    (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary[1:], vocabulary[0]]) + "\n")  # [PAD] is the last
    common = [*SMALL, "--corpus", runs / "own.txt", "--held-out", other]
    done = run("train", *common, "--tokenizer", tmp_path / "vocab.txt", "--out", tmp_path / "encoder")
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "encoder" / "best" / "config.json").read_text())
    assert described["vocab_size"] == len(vocabulary) and described["pad_token_id"] == len(vocabulary) - 1
    own, trained = tmp_path / "encoder" / "config.toml", runs / "encoder" / "config.toml"  # without and with a size
    for number, more in enumerate((["--config", own], ["--config", trained, "--tokenizer", tmp_path / "vocab.txt"])):
        again = run("train", *more, "--out", tmp_path / f"again{number}")
        assert again.returncode == 0, again.stderr
    done = run("train", *common, "--vocabulary", 300, "--model", "decoder", "--out", tmp_path / "decoder")
    assert done.returncode == 0 and re.search(r"perplexity [\d.]+ per token and [\d.]+ per word", done.stdout), (
        done.stderr
    )
    assert len(os.listdir(tmp_path / "decoder" / "tokens")) == 1
    words = len(other.read_text().split()) + other.read_text().count("\n")
    lines = [json.loads(row) for row in (tmp_path / "decoder" / "metrics.jsonl").read_text().splitlines()]
    line = min(lines, key=lambda row: row["held_out_loss"])
    for more in ([], ["--text", other, "--length", 16]):
        found = run("evaluate", "--checkpoint", tmp_path / "decoder", *more)
        assert found.returncode == 0 and f"loss {line['held_out_loss']:.4f} nats" in found.stdout, found.stderr
        per_word = math.exp(line["held_out_loss"] * line["held_out_labels"] / words)
        assert f"perplexity {per_word:.2f} per word: the whole loss over {words:,} words" in found.stdout
    (tmp_path / "vocab.txt").unlink()  # the run has its own copy
    assert run("train", "--resume", tmp_path / "encoder").returncode == 0
    refused(tmp_path, ["train", "--tokenizer", "decoder/best"], r"--tokenizer: expected a tokenizer with \[PAD\]")
    refused(tmp_path, ["train", "--tokenizer", "vocab.txt"], "--tokenizer: .*vocab.txt: no such file")
    refused(tmp_path, ["train", "--tokenizer", "decoder/best", "--vocabulary", "400"], "--vocabulary: not beside --tok")
    refused(tmp_path, ["train", "--held-out", "other.txt"], "--held-out: needs --corpus")


def test_generate_continues_and_repeats(runs):
    arguments = ["generate", "--checkpoint", runs / "decoder", "--prompt", "Sentence", "--temperature", "1"]
    first, again, other = (run(*arguments, "--seed", seed).stdout for seed in (0, 0, 1))
    assert first == again != other and first.startswith("Sentence") and len(first) > 12
    greedy = run_alone("generate", "--checkpoint", runs / "decoder", "--tokens", 3)
    assert greedy.returncode == 0 and greedy.stderr == ""


def test_a_run_in_tf32_goes_on_on_a_processor(runs, tmp_path):
    gpu = ["--device", "auto", "--precision", "tf32"]
    alone = ["--corpus", runs / "own.txt", "--vocabulary", 300, *gpu, "--out", tmp_path]
    done = run_alone("train", *SMALL, *alone)  # a GPU here would keep to TF32
    assert done.returncode == 0, done.stderr
    done = run("train", "--resume", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    done = run("train", "--resume", tmp_path, "--device", "cpu", "--precision", "tf32")
    assert done.returncode == 2 and "--precision: tf32 is a GPU's" in done.stderr


def test_resume_of_a_finished_run_says_so_and_changes_nothing(runs):
    before = {path: path.read_bytes() for path in (runs / "decoder").rglob("*") if path.is_file()}
    done = run("train", "--resume", runs / "decoder", "--steps", 6)
    assert done.returncode == 0 and "Best held-out loss" in done.stdout, done.stderr
    after = {path: path.read_bytes() for path in (runs / "decoder").rglob("*") if path.is_file()}
    assert after == before


def test_interrupt_says_how_to_go_on(tmp_path, runs):
    arguments = [*SMALL[:-2], "--steps", "100000", "--eval-every", "50000", "--vocabulary", "300"]
    command = [sys.executable, "-m", "minisaobp", "train", *arguments]
    command += ["--corpus", str(runs / "own.txt"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "loss" not in process.stderr.read(40):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert re.search(r"Stopped after step \d+; .*checkpoint.safetensors goes on from there", errors)
    assert f"--resume {tmp_path / 'out'}" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "30", "--heads", "4"], "--heads: expected a divisor of hidden_size = 30, got 4"),
        (["--variant", "high", "low", "high"], "--variant: expected 4 values, one per layer, got 3"),
        (["--lam", "nan"], "--lam: expected a number from -80 to 80"),
        (["--dropout", "1"], "--dropout: expected a number from 0 to 0.99"),
        (["--learn-lam", "head"], "--learn-lam: expected a layer of variant high or low"),
        (["--regulariser", "entropy"], "--regulariser: needs --regulariser-strength beside it, a number above 0"),
        (["--regulariser-strength", "1"], "--regulariser-strength: expected 0 without a regulariser, got 1.0"),
        (
            ["--variant", "none", "--regulariser", "eigen", "--regulariser-strength", "1"],
            "--regulariser: expected a layer",
        ),
        (["--corpus", "missing.txt"], r"--corpus: .*missing.txt cannot be read \(no such file\)"),
        (["--corpus", "short.txt"], "--corpus: the training text has .* tokens, shorter than one sequence"),
        (["--resume", "nothing"], "--resume: nothing.*no such file"),
        (["--resume", "run", "--steps", "7"], "--steps: expected that of the run, 6, got 7"),
        (["--resume", "run", "--corpus", "short.txt"], "--corpus: expected that of the run"),
        (["--resume", "run", "--out", "elsewhere"], "--out: expected that of the run"),
        (["--resume", "mixed"], "--resume: .* is a checkpoint of another run than mixed/run.json"),
        (["--resume", "alien"], "--resume: .*is not of a run that `train` or `pretrain` started"),
        (["--out", "files"], "--out: best is a file in 'files'"),
        (["--out", "run"], "--out: 'run' holds a run; go on with it by --resume run"),
        (["--config", "none.toml"], r"--config: none.toml cannot be read \(No such file"),
        (["--config", "broken.toml"], r"--config: broken.toml cannot be read as TOML \(.*line 2"),
        (["--config", "binary.toml"], r"--config: binary.toml cannot be read as TOML"),
        (
            ["--config", "unknown.toml"],
            "--config: unknown.toml: preset: no such option; expected some of model, layers,",
        ),
        (
            ["--config", "value.toml"],
            "--config: value.toml: argument --lam: expected a number from -80 to 80, got '81'",
        ),
        (["--config", "flag.toml"], "--config: flag.toml: keep_models: expected true or false, got 1"),
        (
            ["--config", "table.toml"],
            "--config: table.toml: steps: expected a number, a text or a list of them, got {}",
        ),
        (["--config", "value.toml", "--resume", "run"], "--config: not beside --resume"),
    ],
)
def test_bad_training_options_are_one_line(tmp_path, runs, arguments, message):
    (tmp_path / "short.txt").write_text("too short")
    for name, text in {
        "broken": "steps = 3\nlam = [0.1 0.2]",
        "unknown": 'preset = "bert-mini"',
        "value": "lam = [0.1, 81]",
        "flag": "keep_models = 1",
        "table": "[steps]",
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "binary.toml").write_bytes(b"steps = \xff")
    (tmp_path / "run").symlink_to(runs / "decoder")
    for folder in ("mixed", "alien", "files"):
        (tmp_path / folder).mkdir()
    (tmp_path / "files" / "best").write_text("")
    shutil.copy(runs / "encoder" / "checkpoint.safetensors", tmp_path / "mixed")
    shutil.copy(runs / "decoder" / "run.json", tmp_path / "mixed")
    model = model_of()
    write_checkpoint(
        tmp_path / "alien",
        model.parameters,
        AdamW.for_parameters(model.parameters),
        {"about": {}, "best": None, "interval": []},
    )
    refused(tmp_path, ["train", *arguments], message)


def test_a_run_repeats_from_the_config_that_it_wrote(tmp_path, runs):
    config = tmp_path / "café.toml"
    config.write_bytes(b"\xef\xbb\xbf" + (runs / "encoder" / "config.toml").read_bytes() + b"# a comment\r\n")
    done = run("train", "--config", config, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "config.toml").read_bytes() == (runs / "encoder" / "config.toml").read_bytes()
    for name in ("best", "last"):
        weights = [
            (folder / name / "model.safetensors").read_bytes() for folder in (runs / "encoder", tmp_path / "again")
        ]
        assert weights[0] == weights[1]
    done = run("train", "--config", config, "--out", tmp_path / "other", "--seed", 1, "--variant", "none")
    assert done.returncode == 2 and "--learn-lam: expected a layer of variant high or low" in done.stderr


def test_pretrain_has_the_settings_of_the_paper():
    asked = {
        name: pretrain.complete({"preset": name}, pytest.fail) for name in ("bert-mini", "bert-small", "gpt2-medium")
    }
    assert [(a["steps"], a["rate"], a["warmup"], a["seed"]) for a in asked.values()] == [
        (60_000, 5e-5, 3_000, 42),
        (150_000, 3e-4, 7_500, 42),
        (245_000, 3e-4, 12_000, 42),
    ]  # Table 5
    assert [a["vocabulary"] for a in asked.values()] == [30522, 30522, 50257]
    shorter = pretrain.complete({"preset": "bert-mini", "steps": 1000, "seed": 7}, pytest.fail)
    assert (shorter["warmup"], shorter["eval_every"], shorter["rate"], shorter["seed"]) == (50, 100, 5e-5, 7)


def test_pretrain_trains_a_model_of_the_paper(tmp_path, runs):
    options = ["--corpus", runs / "own.txt", "--steps", 2, "--batch", 1, "--length", 16, "--vocabulary", 300]
    done = run("pretrain", "--preset", "gpt2-mini", "--variant", "high", *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "out" / "best" / "config.json").read_text())
    assert (described["n_layer"], described["n_embd"], described["n_head"], described["n_inner"]) == (4, 256, 4, 1024)
    assert described["lam"] == 0.2 and described["attention_variant"] == "high"
    assert 'preset = "gpt2-mini"\n' in (tmp_path / "out" / "config.toml").read_text()
    again = run("pretrain", "--resume", tmp_path / "out")
    assert again.returncode == 0 and "Best held-out loss" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--preset: expected the name of a model"),
        (["--preset", "bert-huge"], "--preset: expected one of bert-mini.*'bert-huge'"),
        (["--preset", "bert-mini", "--width", "32"], "unrecognized arguments: --width 32"),
        (["--preset", "gpt2-mini", "--length", "2000"], "--length: expected at most the 1024 positions of gpt2-mini"),
        (["--preset", "bert-mini", "--variant", "high", "low"], "--variant: expected 4 values, one per layer, got 2"),
    ],
)
def test_bad_options_of_pretrain_are_one_line(tmp_path, arguments, message):
    refused(tmp_path, ["pretrain", *arguments], message)


def test_a_text_that_has_changed_is_refused(tmp_path, runs):
    text = tmp_path / "own.txt"
    text.write_text((runs / "own.txt").read_text())
    done = run("train", *SMALL, "--corpus", text, "--vocabulary", 300, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text.write_text(text.read_text() + "\n\nSomething more.")
    for arguments in (["train", "--resume", tmp_path / "out"], ["evaluate", "--checkpoint", tmp_path / "out"]):
        done = run(*arguments)
        assert done.returncode == 2 and re.search("the text .*the run|no longer the text", done.stderr), done.stderr


def test_a_run_killed_before_its_first_checkpoint_is_started_again(tmp_path, runs):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "download.part").write_text("not ours")
    shutil.copy(runs / "encoder" / "run.json", tmp_path / "out")
    (tmp_path / "out" / "run.json12345678.part").write_text("half")
    (tmp_path / "out" / "best").mkdir()
    (tmp_path / "out" / "best" / "tokenizer.json").write_text("that of another run")
    done = run("train", *SMALL, "--corpus", runs / "own.txt", "--vocabulary", 300, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine" / "download.part").exists()
    assert not list((tmp_path / "out").glob("*.part"))
    assert run("evaluate", "--checkpoint", tmp_path / "out").returncode == 0


def test_divergence_is_one_line_and_keeps_the_checkpoint(tmp_path, runs):
    options = ["--corpus", runs / "own.txt", "--vocabulary", 300, "--rate", 10, "--weight-decay", 10, "--warmup", 0]
    done = run("train", *SMALL[:-2], *options, "--steps", 40, "--out", tmp_path, "--variant", "high")
    assert done.returncode == 2 and "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert re.search("training diverges|held-out loss is", done.stderr.splitlines()[-1]), done.stderr
    assert (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--checkpoint", "nothing"], "--checkpoint: nothing/config.json cannot be read"),
        (["evaluate", "--checkpoint", "alone"], "--text: needed, since alone lies in no folder"),
        (["evaluate", "--checkpoint", "run", "--text", "missing.txt"], "--text: .*missing.txt"),
        (["evaluate", "--checkpoint", "run", "--length", "17"], "--length: expected at most the model's 16 positions"),
        (["generate", "--checkpoint", "encoder"], "--checkpoint: expected a decoder"),
        (["generate", "--checkpoint", "run", "--tokens", "16"], "--tokens: expected at most 15 after a prompt of 1"),
        (["generate", "--checkpoint", "run", "--prompt", "word " * 99], "--prompt: expected fewer tokens than"),
        (["generate", "--checkpoint", "damaged"], "--checkpoint: damaged/best/model.safetensors cannot be read"),
        (["generate", "--checkpoint", "run", "--temperature", "-1"], "--temperature: expected a number from 0 to 100"),
    ],
)
def test_bad_models_and_texts_are_one_line(tmp_path, runs, arguments, message):
    (tmp_path / "run").symlink_to(runs / "decoder")
    (tmp_path / "encoder").symlink_to(runs / "encoder")
    for name in ("alone", "damaged/best"):
        (tmp_path / name).mkdir(parents=True)
        for file in (runs / "decoder" / "best").iterdir():
            content = file.read_bytes()
            cut = len(content) // 2 if name != "alone" and file.suffix == ".safetensors" else len(content)
            (tmp_path / name / file.name).write_bytes(content[:cut])
    refused(tmp_path, arguments, message)


def test_help_explains_every_option():
    for command, names in (
        ("train", ["resume", "config", "model", "variant", "lam", "learn-lam", "regulariser", "accumulate", "seed"]),
        ("pretrain", ["resume", "config", "preset", "variant", "steps", "rate", "warmup", "seed", "corpus"]),
        ("evaluate", ["checkpoint", "text", "length"]),
        ("generate", ["checkpoint", "prompt", "temperature", "top-k"]),
    ):
        text = run(command, "--help").stdout
        assert all(f"--{name}" in text for name in names)
