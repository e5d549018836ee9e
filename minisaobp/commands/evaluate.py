"""evaluate: held-out loss and perplexity of a model."""

from . import options

NAME, HELP = "evaluate", "held-out loss and perplexity of a trained model"
DESCRIPTION = (
    "Loss, perplexity and accuracy of a model: on the held-out text of its own training run, or on a text of yours."
)


def add(parser):
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR",
        help="folder of a training run (its best model), or of a model with config.json, model.safetensors and "
        "tokenizer.json")  # fmt: skip
    add("--text", nargs="+", metavar="FILE", help="UTF-8 text files, read whole (default: what the run held out)")
    add("--length", type=options.whole(8, 10**5), help="tokens per sequence (default: the run's, or all positions)")
    add("--batch", type=options.whole(1, 10**6), default=32, help="sequences at a time (default: %(default)s)")
    options.add_device(parser)


def run(args, fail):
    from ..text.corpora import whole_files
    from ..text.dataset import examples_of, held_out_batches, read_dataset
    from ..training.loop import evaluate

    xp = options.device_library(args, fail)
    model, tokenizer, directory = options.opened(args.checkpoint, fail)
    if model.config.head != "lm":
        fail(f"argument --checkpoint: expected a language model, {directory} has the head {model.config.head!r}")
    causal = model.config.model_type == "gpt2"
    asked, trained_on = options.run_of(directory, fail)
    if args.text is None and asked is None:
        fail(f"argument --text: needed, since {directory} does not lie in the folder of a training run")
    length = args.length or (asked["length"] if asked else model.config.max_position_embeddings)
    if length > model.config.max_position_embeddings:
        fail(
            f"argument --length: expected at most the model's {model.config.max_position_embeddings} positions, "
            f"got {length}"
        )
    try:
        if args.text is None:
            text = read_dataset(asked["corpus"], causal, length, tokenizer=tokenizer)
            if text.fingerprint != trained_on:
                fail(f"argument --checkpoint: {text.source} is no longer the text that the run was trained on")
            examples, source = text.held_out, f"the held-out part of {text.source}"
        else:
            examples = examples_of(whole_files(args.text), tokenizer, causal, length)
            source = ", ".join(args.text)
        score = evaluate(model.on(xp), held_out_batches(examples, tokenizer, causal, args.batch))
    except ValueError as error:
        fail(f"argument {'--checkpoint, the text of its run' if args.text is None else '--text'}: {error}")
    what = "tokens" if causal else "masked tokens, 4 maskings"
    print(f"{directory} on {source}, sequences of {length} tokens")
    print(f"loss {score.loss:.4f} nats, perplexity {score.perplexity:.2f}, accuracy {score.accuracy:.2%}")
    print(f"{score.labels:,} {what}")
