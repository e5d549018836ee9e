"""generate: text from a trained decoder."""

import sys

from . import options

NAME, HELP = "generate", "text from a trained decoder"
DESCRIPTION = "Continue a text with a GPT-2-style decoder, token by token."


def add(parser):
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder of a training run (its best model), or of a model")
    add("--prompt", default="", metavar="TEXT", help="the text to continue (default: the start of a document)")
    add("--tokens", type=options.whole(1, 10**6), help="how many at most (default: as many as there are positions)")
    add("--temperature", type=options.real(0, 100), default=0.0,
        help="0 takes the likeliest token, 1 draws from the model's probabilities (default: %(default)s)")  # fmt: skip
    add("--top-k", type=options.whole(1, 10**6), help="draw from that many of the likeliest tokens alone")
    add("--seed", type=options.seed, default=0, help="of the draws (default: %(default)s)")
    options.add_device(parser)


def run(args, fail):
    import numpy as np

    from ..backend import generator
    from ..text.tokenizer import END_OF_TEXT

    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        fail("argument --prompt: expected UTF-8 text")
    xp = options.device_library(args, fail)
    model, tokenizer, directory = options.opened(args.checkpoint, fail)
    if model.config.model_type != "gpt2":
        fail(f"argument --checkpoint: expected a decoder, {directory} holds an encoder")
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = tokenizer.encode(args.prompt, add_special_tokens=False).ids or ([] if end is None else [end])
    if not ids:
        fail("argument --prompt: expected some text, for this tokenizer knows no start of a document")
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        fail(f"argument --prompt: expected fewer tokens than the model's {positions} positions, got {len(ids)}")
    tokens = args.tokens or positions - len(ids)
    try:
        drawn = model.on(xp).generate(np.array([ids]), tokens, args.temperature, args.top_k, generator(xp, args.seed))
    except ValueError as error:
        fail(str(error).replace("tokens:", "argument --tokens:"))
    # a token may be half of a letter: what the whole text so far decodes to is printed as far as it is certain
    text, shown = [], 0
    written = tokenizer.decode(ids) if args.prompt else ""
    sys.stdout.write(written)
    for token in drawn:
        if token[0] == end:
            break
        text.append(int(token[0]))
        decoded = tokenizer.decode(text)
        certain = len(decoded.rstrip("\ufffd"))
        sys.stdout.write(decoded[shown:certain])
        sys.stdout.flush()
        shown = max(shown, certain)
    sys.stdout.write("\n")
