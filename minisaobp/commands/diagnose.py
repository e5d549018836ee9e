"""diagnose: what the paper measures on attention, of any model or any attention arrays, as a table and a report."""

import csv
import io
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import options

NAME, HELP = "diagnose", "measure the attention of models, or of attention arrays, and write a report"
DESCRIPTION = (
    "GTD, indirect entropy, entropy, sparsity, kinds of heads and graph measures, by layer and head: of models (ours "
    "or Hugging Face's BERT and GPT-2), of attention arrays from any framework, or of a training run over time."
)


def add(parser):
    add, whole = parser.add_argument, options.whole
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", nargs="+", metavar="DIR",
        help="training runs (their best models) or models; several are overlaid")  # fmt: skip
    source.add_argument("--attention", nargs="+", metavar="FILE",
        help=".npy, .npz or .safetensors with an array (layers, batch, heads, L, L), in the last two named attention, "
        "beside an optional attention_mask (batch, L)")  # fmt: skip
    source.add_argument("--run", dest="over_time", metavar="DIR",
        help="a run with models of every evaluation (train --keep-models): GTD against loss and accuracy")  # fmt: skip
    add("--text", nargs="+", metavar="FILE", help="UTF-8 text files, read whole (default: what the run held out)")
    add("--length", type=whole(8, 10**5), help="tokens per sequence (default: the run's, or 128)")
    add("--sequences", type=whole(1, 10**9), default=1024, help="at most that many (default: %(default)s)")
    add("--batch", type=whole(1, 10**6), default=8, help="sequences at a time (default: %(default)s)")
    add("--graphs", type=whole(0, 10**6), default=16,
        help="sequences whose token graphs are measured (default: %(default)s)")  # fmt: skip
    add("--beta", type=options.real(1e-6, 1), default=0.9, help="of GTD, Eq. 12 (default: %(default)s)")
    add("--hops", type=_hops, default=4, help="K of GTD, Eq. 12, or inf, for which beta < 0.999 (default: %(default)s)")
    add("--causal", action="store_true", help="the arrays of --attention are causal: no token attends to a later one")
    options.add_device(parser)
    add("--out", default="runs/diagnose", metavar="DIR",
        help="for report.html, metrics.json and metrics.csv (default: %(default)s)")  # fmt: skip


def _hops(text):
    return math.inf if text == "inf" else options.whole(2, 1000)(text)


def run(args, fail):
    if args.attention and args.text:
        fail("argument --text: not beside --attention, which needs no text")
    if args.causal and not args.attention:
        fail("argument --causal: of arrays alone; of a model it is known")
    if args.hops == math.inf and args.beta >= 0.999:
        fail(f"argument --beta: expected below 0.999 beside --hops inf, got {args.beta:g}")
    from ..diagnose import NotAttention, training_correlations
    from ..interrupts import interrupts

    xp = options.device_library(args, fail)
    sources, variants = _sources(args, xp, fail)
    snapshots = _snapshots(args, fail) if args.over_time else []
    out = options.writable_folder(args.out, ("report.html", "metrics.json", "metrics.csv"), fail)
    with interrupts() as asked:
        try:
            done = [_measure(source, args, asked) for source in sources]
        except NotAttention as error:
            fail(f"argument --attention: {error}")
        points = [] if asked() else _over_training(snapshots, args, xp, asked, fail)
        overtime = training_correlations(points) if points else None
        results = [
            d.result() | {"complete": d.seen >= s.count} for d, s in zip(done, sources, strict=True) if d.sequences
        ]
        missing = [d.name for d in done if not d.sequences]
        if results:
            _write(out, xp, results, {d.name: d.example for d in done if d.sequences}, variants, overtime, missing)
    if not results:
        if asked():
            print("Nothing was measured yet: nothing is written", file=sys.stderr)
            raise KeyboardInterrupt
        fail("no sequence has a token that is not padding: nothing to measure")
    print("\n".join(_table(result) for result in results))
    for found in overtime["correlations"] if overtime else []:
        r = "not defined" if found["r"] is None else f"{found['r']:.3f} (p = {found['p']:.2g})"
        print(f"{found['x']} and {found['y']} over {found['points']} models: r {r}")
    if missing:
        print(f"Not measured: {', '.join(missing)}")
    from ..metrics import idempotent_gtd

    same = idempotent_gtd(args.beta, args.hops)
    print(
        f"GTD is {same:.3f} for identity, uniform attention and full collapse alike: read it with the indirect entropy"
    )
    print(f"Wrote {out / 'report.html'}, {out / 'metrics.json'} and {out / 'metrics.csv'}")
    if asked():
        raise KeyboardInterrupt


class Source(NamedTuple):
    name: str
    count: int  # sequences to measure
    batches: Iterator  # of (maps, valid)
    causal: bool


def _sources(args, xp, fail):
    """What is to be measured, and {name: attention variant} of the models, None where it is not one."""
    from ..diagnose import NotAttention, attention_file

    sources, variants = [], {}
    for path in args.attention or []:
        try:
            count, batches = attention_file(path, args.batch)
        except NotAttention as error:
            fail(f"argument --attention: {error}")
        name = _name(path, variants)
        variants[name] = None
        batches = ((xp.asarray(maps), valid) for maps, valid in batches)
        sources.append(Source(name, min(count, args.sequences), batches, args.causal))
    for path in args.checkpoint or ([args.over_time] if args.over_time else []):
        model, examples = _model_and_text(path, args, fail)
        name = _name(path, variants)
        kinds = set(model.config.variants)
        variants[name] = kinds.pop() if len(kinds) == 1 else None
        sources.append(_source_of(name, model.on(xp), examples, args))
    return sources, variants


def _source_of(name, model, examples, args):
    count = min(len(examples.ids), args.sequences)
    return Source(name, count, _maps_of(model, examples, args.batch), model.config.model_type == "gpt2")


def _measure(source, args, asked, graphs=None):
    """The Diagnosis of a source: of as many of its sequences as there was time for until Ctrl-C."""
    from tqdm import tqdm

    from ..diagnose import Diagnosis, NotAttention

    graphs = args.graphs if graphs is None else graphs
    diagnosis = Diagnosis(source.name, args.beta, args.hops, graphs, source.causal)
    with tqdm(total=source.count, desc=source.name, unit="sequence") as bar:
        while diagnosis.seen < source.count and not asked():
            maps, valid = next(source.batches)
            left = source.count - diagnosis.seen
            try:
                diagnosis.add(maps[:, :left], None if valid is None else valid[:left])
            except NotAttention as error:
                raise NotAttention(f"{source.name}: {error}") from None
            bar.update(min(left, maps.shape[1]))
    return diagnosis


def _over_training(snapshots, args, xp, asked, fail):
    """(result, line of metrics.jsonl) of every model of a run that there was time for."""
    points = []
    for step, path, line in snapshots:
        model, examples = _model_and_text(path, args, fail)
        source = _source_of(f"step {step}", model.on(xp), examples, args)
        diagnosis = _measure(source, args, asked, graphs=0)
        if asked():
            break
        points.append((diagnosis.result(), line))
    return points


def _model_and_text(path, args, fail):
    from ..text.corpora import whole_files
    from ..text.dataset import examples_of, read_dataset

    model, tokenizer, directory = options.opened(path, fail)
    asked, trained_on = options.run_of(directory, fail)
    positions = model.config.max_position_embeddings
    length = args.length or min(positions, asked["length"] if asked else 128)
    if length > positions:
        fail(f"argument --length: expected at most the {positions} positions of {directory}, got {length}")
    causal = model.config.model_type == "gpt2"
    if args.text is None and asked is None:
        fail(f"argument --text: needed, since {directory} lies in no folder of a run that was trained on a text")
    try:
        if args.text is not None:
            return model, examples_of(whole_files(args.text), tokenizer, causal, length)
        text = read_dataset(asked["corpus"], causal, length, tokenizer=tokenizer, held_out=asked["held_out"])
    except ValueError as error:
        fail(f"argument {'--text' if args.text else '--checkpoint, the text of its run'}: {error}")
    if text.fingerprint != trained_on:
        fail(f"argument --checkpoint: {text.source} is no longer the text that the run was trained on")
    return model, text.held_out


def _maps_of(model, examples, size):
    from ..text.batches import in_order

    for batch in in_order(examples, size):
        yield model.attention_maps(batch.ids, batch.attention_mask), batch.attention_mask


def _snapshots(args, fail):
    """(step, folder, line of metrics.jsonl) of every model that a run has kept."""
    from ..training.run import lines_until

    folder = Path(args.over_time)
    lines = {line["step"]: line for line in lines_until(folder / "metrics.jsonl", float("inf"))}
    found = []
    for path in (folder / "models").glob("step-*"):
        step = path.name.removeprefix("step-")
        if step.isdigit() and int(step) in lines:
            found.append((int(step), path, lines[int(step)]))
    if len(found) < 3:
        where = folder / "models"
        fail(f"argument --run: expected three models or more in {where} (train --keep-models), got {len(found)}")
    return sorted(found, key=lambda item: item[0])


def _name(path, taken):
    """A short name for a source that no other has."""
    path = Path(path)
    short = os.fsencode(path.resolve().name if path.is_dir() else path.name).decode("utf-8", "replace")
    name, n = short, 2
    while name in taken:
        name, n = f"{short} ({n})", n + 1
    return name


def _table(result):
    columns = ["entropy", "gtd", "cross_layer_gtd", "indirect_entropy", "sparsity", "sink", "local"]
    titles = ["entropy", "GTD", "cross GTD", "ind. entropy", "sparsity", "col. mass", "local"]
    note = "" if result["complete"] else ", INCOMPLETE"
    lines = [f"\n{result['name']}: {result['sequences']} sequences{note}"]
    lines.append("layer" + "".join(f"{title:>14}" for title in titles) + "  heads")
    for row in result["layers"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["regimes"].items() if count)
        lines.append(f"{row['layer']:>5}" + "".join(f"{row[name]:>14.3f}" for name in columns) + f"  {kinds}")
    return "\n".join(lines)


def _write(out, xp, results, examples, variants, overtime, missing):
    from ..files import write_json, write_whole
    from ..report import report_html
    from ..results import device_name, environment

    page = report_html(results, examples, variants, overtime, missing).encode()
    machine = {"environment": environment(), "device": device_name(xp)}
    found = {"results": results, "not_measured": missing, "over_training": overtime}
    write_json(out / "metrics.json", machine | found)
    table = io.StringIO(newline="")
    names = ["model", "layer", "head", "regime", "entropy", "gtd", "cross_layer_gtd", "indirect_entropy", "sparsity",
             "sink", "normalised_entropy", "local", "position", "sequence", "clustering", "clustering_barrat",
             "clustering_onnela", "betweenness", "betweenness_weighted", "sequences", "complete"]  # fmt: skip
    writer = csv.DictWriter(table, names, extrasaction="ignore", restval="")
    writer.writeheader()
    for result in results:
        same = {"model": result["name"], "sequences": result["sequences"], "complete": result["complete"]}
        writer.writerows([row | same | {"head": "all"} for row in result["layers"]])
        writer.writerows([row | same for row in result["heads"]])
        for layer, entropies in enumerate(result["positional_entropy"], 1):
            rows = [{"layer": layer, "position": n, "entropy": value} for n, value in enumerate(entropies, 1)]
            writer.writerows([row | same for row in rows])
        writer.writerows([row | same for row in result["graphs"]])
    write_whole(out / "metrics.csv", lambda file: file.write(table.getvalue().encode()))
    write_whole(out / "report.html", lambda file: file.write(page))
