"""evaluate: held-out loss and perplexity of a model, or its scores on a task."""

from . import options

NAME, HELP = "evaluate", "held-out loss and perplexity of a trained model, or its scores on a task"
DESCRIPTION = (
    "Loss, perplexity and accuracy of a model: on the held-out text of its own training run, or on a text of yours; or "
    "a fine-tuned model's scores on a task, or those of a decoder without training."
)


def add(parser):
    from ..text.tasks import TASKS

    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR",
        help="folder of a training run (its best model), or of a model with config.json, model.safetensors and "
        "tokenizer.json")  # fmt: skip
    add("--text", nargs="+", metavar="FILE", help="UTF-8 text files, read whole (default: what the run held out)")
    add("--task", choices=list(TASKS), help="scores on this task in place of a text")
    add("--data", metavar="DIR", help="folder with the task's official files, or one above it (see data/README.md)")
    add("--zero-shot", action="store_true",
        help="let a decoder choose by likelihood (hellaswag, race, race-high, boolq)")  # fmt: skip
    add("--split", metavar="NAME", help="of the task (default: its first dev split)")
    add("--examples", type=options.whole(1, 10**9), help="the first so many of the split only (default: all)")
    add("--skip-bad", action="store_true", help="count lines that are not in the task's format, and go on")
    add("--out", metavar="DIR", help="folder for the task's metrics.json and predictions (default: only printed)")
    add("--length", type=options.whole(8, 10**5), help="tokens per sequence (default: the run's, or all positions)")
    add("--batch", type=options.whole(1, 10**6), default=32, help="sequences at a time (default: %(default)s)")
    options.add_device(parser)


def run(args, fail):
    from tqdm import tqdm

    from ..text.corpora import whole_files
    from ..text.dataset import examples_of, held_out_batches, read_dataset
    from ..training.loop import evaluate

    xp = options.device_library(args, fail)
    if args.task is not None:
        from .evaluate_task import evaluate_task

        return evaluate_task(args, xp, fail)
    for name in ("data", "zero_shot", "split", "examples", "skip_bad", "out"):
        if getattr(args, name):
            fail(f"argument --{name.replace('_', '-')}: only beside --task")
    model, tokenizer, directory = options.opened(args.checkpoint, fail)
    if model.config.head != "lm":
        fail(f"argument --checkpoint: expected a language model, {directory} has the head {model.config.head!r}")
    causal = model.config.model_type == "gpt2"
    asked, trained_on = options.run_of(directory, fail)
    if args.text is None and asked is None:
        fail(f"argument --text: needed, since {directory} lies in no folder of a run that was trained on a text")
    length = args.length = args.length or (asked["length"] if asked else model.config.max_position_embeddings)
    if length > model.config.max_position_embeddings:
        fail(
            f"argument --length: expected at most the model's {model.config.max_position_embeddings} positions, "
            f"got {length}"
        )
    try:
        if args.text is None:
            text = read_dataset(asked["corpus"], causal, length, tokenizer=tokenizer, held_out=asked["held_out"])
            if text.fingerprint != trained_on:
                fail(f"argument --checkpoint: {text.source} is no longer the text that the run was trained on")
            documents, examples = text.documents[1], text.held_out
            source = f"the held-out part of {text.source}"
            if asked["held_out"]:
                source = ", ".join(asked["held_out"])
        else:
            documents = whole_files(args.text)
            examples, source = examples_of(documents, tokenizer, causal, length), ", ".join(args.text)
        batches = held_out_batches(examples, tokenizer, causal, args.batch)
        score = evaluate(model.on(xp), tqdm(batches, unit="batch", delay=2, leave=False))
    except ValueError as error:
        fail(f"argument {'--checkpoint, the text of its run' if args.text is None else '--text'}: {error}")
    what = "tokens" if causal else "masked tokens, 4 maskings"
    print(f"{directory} on {source}, sequences of {length} tokens")
    print(f"loss {score.loss:.4f} nats, perplexity {score.perplexity:.2f}, accuracy {score.accuracy:.2%}")
    print(f"{score.labels:,} {what}")
    if causal:
        words = documents.words()
        print(
            f"perplexity {score.perplexity_per(words):.2f} per word: the whole loss over {words:,} words and line "
            "ends, as WikiText counts"
        )
