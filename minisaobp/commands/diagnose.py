"""diagnose: what the paper measures on attention, of any model or any attention arrays, as a table and a report."""

import csv
import io
import sys
from pathlib import Path

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
    add("--beta", type=options.real(1e-6, 1e6), default=0.9, help="of GTD, Eq. 12 (default: %(default)s)")
    add("--hops", type=whole(2, 1000), default=4, help="K of GTD, Eq. 12 (default: %(default)s)")
    options.add_device(parser)
    add("--out", default="runs/diagnose", metavar="DIR",
        help="for report.html, metrics.json and metrics.csv (default: %(default)s)")  # fmt: skip


def run(args, fail):
    if args.attention and args.text:
        fail("argument --text: not beside --attention, which needs no text")
    from ..diagnose import Diagnosis, NotAttention, attention_file, training_correlations

    xp = options.device_library(args, fail)
    out = options.writable_folder(args.out, ("report.html", "metrics.json", "metrics.csv"), fail)
    sources, variants = [], {}
    for path in args.attention or []:
        try:
            count, batches = attention_file(path, args.batch)
        except NotAttention as error:
            fail(f"argument --attention: {error}")
        name = _name(path, variants)
        variants[name] = None
        sources.append((name, min(count, args.sequences), batches))
    for path in args.checkpoint or ([args.over_time] if args.over_time else []):
        model, examples = _model_and_text(path, args, fail)
        name = _name(path, variants)
        kinds = set(model.config.variants)
        variants[name] = kinds.pop() if len(kinds) == 1 else None
        sources.append((name, min(len(examples.ids), args.sequences), _maps_of(model.on(xp), examples, args.batch)))
    snapshots = _snapshots(args, fail) if args.over_time else []

    diagnoses = [Diagnosis(name, args.beta, args.hops, args.graphs) for name, _, _ in sources]
    stopped, overtime = False, None
    for diagnosis, (name, count, batches) in zip(diagnoses, sources, strict=True):
        try:
            stopped = stopped or _measure(diagnosis, name, count, batches)
        except NotAttention as error:
            fail(f"argument --attention: {name}: {error}")
    if snapshots and not stopped:
        points = []
        for step, path, line in snapshots:
            model, examples = _model_and_text(path, args, fail)
            one = Diagnosis(f"step {step}", args.beta, args.hops, 0)
            stopped = _measure(one, one.name, min(len(examples.ids), args.sequences),
                               _maps_of(model.on(xp), examples, args.batch))  # fmt: skip
            if stopped:
                break
            points.append((one.result(), line))
        overtime = training_correlations(points)
    seen = [
        (diagnosis, count) for diagnosis, (_, count, _) in zip(diagnoses, sources, strict=True) if diagnosis.sequences
    ]
    if not seen:
        print("Nothing was measured yet: nothing is written", file=sys.stderr)
        raise KeyboardInterrupt
    results = [d.result() | {"complete": d.sequences >= count and not stopped} for d, count in seen]
    _write(out, results, {d.name: d.example for d, _ in seen}, variants, overtime)
    print("\n".join(_table(result) for result in results))
    if overtime:
        for found in overtime["correlations"]:
            r = "not defined" if found["r"] is None else f"{found['r']:.3f} (p = {found['p']:.2g})"
            print(f"{found['x']} and {found['y']} over {found['points']} models: r {r}")
    print("GTD is 0.856 for identity, uniform attention and full collapse alike: read it with the indirect entropy")
    print(f"Wrote {out / 'report.html'}, {out / 'metrics.json'} and {out / 'metrics.csv'}")
    if stopped:
        raise KeyboardInterrupt


def _measure(diagnosis, name, count, batches):
    """Add batches until `count` sequences are seen; whether Ctrl-C stopped it."""
    from tqdm import tqdm

    from ..interrupts import interrupts

    with interrupts() as asked, tqdm(total=count, desc=name, unit="sequence") as bar:
        for maps, valid in batches:
            left = count - diagnosis.sequences
            diagnosis.add(maps[:, :left], None if valid is None else valid[:left])
            bar.update(min(left, maps.shape[1]))
            if diagnosis.sequences >= count:
                return False
            if asked():
                return True
    return False


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
        fail(f"argument --text: needed, since {directory} does not lie in the folder of a training run")
    try:
        if args.text is not None:
            return model, examples_of(whole_files(args.text), tokenizer, causal, length)
        text = read_dataset(asked["corpus"], causal, length, tokenizer=tokenizer)
    except ValueError as error:
        fail(f"argument {'--text' if args.text else '--checkpoint, the text of its run'}: {error}")
    if text.fingerprint != trained_on:
        fail(f"argument --checkpoint: {text.source} is no longer the text that the run was trained on")
    return model, text.held_out


def _maps_of(model, examples, size):
    from ..backend import to_host
    from ..text.batches import in_order

    for batch in in_order(examples, size):
        yield to_host(model.attention_maps(batch.ids, batch.attention_mask)), batch.attention_mask


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
    short = path.resolve().name if path.is_dir() else path.name
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


def _write(out, results, examples, variants, overtime):
    from ..files import write_json, write_whole
    from ..report import report_html
    from ..results import environment

    page = report_html(results, examples, variants, overtime).encode()
    write_json(out / "metrics.json", {"environment": environment(), "results": results, "over_training": overtime})
    table = io.StringIO(newline="")
    names = ["model", "layer", "head", "regime", "entropy", "gtd", "cross_layer_gtd", "indirect_entropy", "sparsity",
             "sink", "normalised_entropy", "local", "sequences", "complete"]  # fmt: skip
    writer = csv.DictWriter(table, names, extrasaction="ignore", restval="")
    writer.writeheader()
    for result in results:
        same = {"model": result["name"], "sequences": result["sequences"], "complete": result["complete"]}
        writer.writerows([row | same | {"head": "all"} for row in result["layers"]])
        writer.writerows([row | same for row in result["heads"]])
    write_whole(out / "metrics.csv", lambda file: file.write(table.getvalue().encode()))
    write_whole(out / "report.html", lambda file: file.write(page))
