"""Benchmarks of the text: tokenisers trained and used on a corpus, and the input pipeline beside a training step."""

import statistics
import tempfile
import time
from pathlib import Path

from .bench import step_of
from .files import write_json
from .nn import Config
from .results import provenance
from .text.batches import Batches
from .text.corpora import python_documentation, whole_files
from .text.masking import masking
from .text.packing import MaskedSequences, end_of_text
from .text.token_file import token_file
from .text.tokenizer import SpecialTokens, train_bpe, train_wordpiece

VOCABULARY = 2000
BATCH, LENGTH = 16, 64  # as `train` has them by default: the smallest step, beside which the pipeline weighs most
STEPS = 30


def bench_text(out, corpus):
    """Seconds to train a tokenizer and to tokenise a corpus into its file; milliseconds of a batch and of a step.

    Of both the time on the clock and that of the processor, all cores together: the second does not depend on what else
    the machine does, if NumPy has one thread (OMP_NUM_THREADS=1).
    """
    documents = whole_files(corpus) if corpus else python_documentation()[0]
    results = {
        **provenance(),
        "corpus": [Path(path).name for path in corpus or ["pydoc_data.topics"]],
        "characters": documents.characters,
        "words": documents.words(),
        "vocabulary": VOCABULARY,
    }
    print(f"{results['words']:,} words and line ends, {results['characters']:,} characters, vocabulary {VOCABULARY}")
    with tempfile.TemporaryDirectory() as folder:
        for name, train in (("byte-level BPE", train_bpe), ("WordPiece", train_wordpiece)):
            tokenizer, trained = _timed(train, documents, VOCABULARY)
            end = end_of_text(tokenizer) if train is train_bpe else None
            tokens, used = _timed(token_file, folder, documents, tokenizer, end)
            results[name] = {"train_seconds": trained, "tokenise_seconds": used, "tokens": len(tokens.ids)}
            print(
                f"{name:>15}: trained in {trained['clock']:.1f} s, tokenised into {len(tokens.ids):,} tokens in "
                f"{used['clock']:.1f} s ({used['processor']:.1f} s of the processor)"
            )
        mask = masking(SpecialTokens.of(tokenizer), tokenizer.get_vocab_size())
        batches = Batches(MaskedSequences(tokens, tokenizer, LENGTH), 0, mask)
        results["pipeline"] = _pipeline(batches, tokenizer.get_vocab_size())
    batch, step = (1e3 * results["pipeline"][f"{name}_seconds"]["processor"] for name in ("batch", "step"))
    results["pipeline"]["share"] = batch / step
    print(
        f"A masked batch of {BATCH} x {LENGTH}: {batch:.2f} ms of the processor, {batch / step:.2%} of a training step "
        f"of the default encoder ({step:.0f} ms)"
    )
    write_json(out, results)
    print(f"Wrote {out}")


def _timed(function, *arguments):
    """What the function returns, and the seconds it took."""
    clock, processor = time.perf_counter(), time.process_time()
    value = function(*arguments)
    return value, {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def _pipeline(batches, vocabulary):
    """Medians of the seconds of a batch and of a training step on it, one of each in turn."""
    config = Config(vocabulary, 128, 4, 4, 512, LENGTH)
    batch, seconds = batches.batch(0, BATCH), {"batch": [], "step": []}
    step = step_of(config, batch.ids, batch.labels, batch.attention_mask)
    step()
    for number in range(1, STEPS + 1):
        seconds["batch"].append(_timed(batches.batch, number, BATCH)[1])
        seconds["step"].append(_timed(step)[1])
    return {"batch": [BATCH, LENGTH]} | {
        f"{name}_seconds": {kind: statistics.median(row[kind] for row in rows) for kind in ("clock", "processor")}
        for name, rows in seconds.items()
    }
