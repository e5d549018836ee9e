"""A model on a task: what it predicts, its scores, its attention, and the likelihood of choices without training."""

import numpy as np
from tqdm import tqdm

from ..backend import to_host
from ..diagnose import by_layer
from ..interrupts import interrupts
from .run import Judgement

BATCH = 32


def predict(model, encoded):
    """What a model says of every example: numbers of classes or choices, numbers of a regression, or texts of spans.

    encoded: TaskExamples or Windows.
    """
    scores = _scores(model, encoded)
    if model.config.head == "span":
        return encoded.answers(scores)
    if model.config.head == "regression":
        return np.concatenate([batch.reshape(-1) for batch in scores])
    return np.concatenate([batch.argmax(axis=-1) for batch in scores])


def _scores(model, encoded):
    for batch in _batches(encoded, encoded.count):
        yield to_host(model.logits(batch.ids, batch.attention_mask, batch.token_type_ids))


def _batches(encoded, count):
    """The first `count` examples in batches, made one at a time."""
    with tqdm(total=count, desc="dev", unit="example", delay=2, leave=False) as bar:
        for a in range(0, count, BATCH):
            yield encoded.rows(slice(a, min(a + BATCH, count)))
            bar.update(min(BATCH, count - a))


def judging(task, examples, encoded):
    """A function model -> Judgement for `train_run`: the scores on these examples, of which the mean decides."""

    def judge(model):
        scores = task.score(examples, predict(model, encoded))
        sentence = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        return Judgement({f"dev_{name}": value for name, value in scores.items()}, -scores["score"], f"dev {sentence}")

    return judge


def attention_on(model, encoded, count):
    """Entropy, GTD and indirect entropy by layer and their means, on the first `count` examples: the columns of the
    paper's Table 1."""
    count = min(count, encoded.count)
    measured = by_layer(model, _batches(encoded, count), ("entropy", "gtd", "indirect_entropy"))
    return {"examples": count} | {
        name: {"mean": float(np.mean(values)), "layers": values} for name, values in measured.items()
    }


# ---- without training: the likelihood of each choice ---------------------------------------------------------------


def zero_shot(model, tokenizer, task, examples, length):
    """Which choice a decoder finds likeliest after the task's prompt, for each example.

    Returns two integer arrays (N,), the choice of highest log-likelihood, log p(choice | prompt), and that of highest
    log-likelihood per token of the choice, and how many examples were cut: a prompt that does not fit into `length`
    tokens beside its choice is cut at its beginning, and so is a choice that does not fit alone. After Ctrl-C there are
    fewer, those scored by then.
    """
    plain, normalised, cut = [], [], 0
    with interrupts() as asked, tqdm(total=len(examples), desc="choices", unit="example", delay=2, leave=False) as bar:
        for example in examples:
            if asked():
                break
            likelihoods, lengths, was_cut = _choices(model, tokenizer, length, *task.prompt(example))
            plain.append(int(np.argmax(likelihoods)))
            normalised.append(int(np.argmax(likelihoods / lengths)))
            cut += was_cut
            bar.update()
    return np.array(plain, int), np.array(normalised, int), cut


def _choices(model, tokenizer, length, prompt, choices):
    """log p(choice | prompt) in nats and the number of tokens of each choice, and whether anything was cut."""
    rows, cut = [], False
    prompt, *choices = (e.ids for e in tokenizer.encode_batch_fast([prompt, *choices], add_special_tokens=False))
    for choice in choices:
        cut |= len(prompt) + len(choice) > length
        choice = choice[-(length - 1) :]  # one token at least comes before it
        rows.append((prompt[-(length - len(choice)) :], choice))
    L = max(len(before) + len(choice) for before, choice in rows)
    ids, labels = np.zeros((len(rows), L), int), np.full((len(rows), L), -100)
    for n, (before, choice) in enumerate(rows):
        ids[n, : len(before) + len(choice)] = before + choice
        labels[n, len(before) : len(before) + len(choice)] = choice
    valid = np.arange(L) < np.array([[len(before) + len(choice)] for before, choice in rows])
    scores, targets = (to_host(array) for array in model.scored(ids, labels, valid))
    scores = scores.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    log_p = scores[np.arange(len(targets)), targets] - np.log(np.exp(scores).sum(axis=-1))
    lengths = np.array([len(choice) for _, choice in rows])
    return np.add.reduceat(log_p, np.cumsum(lengths) - lengths), lengths, cut
