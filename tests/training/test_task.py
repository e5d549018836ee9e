"""Zero-shot choices and the attention of a task's examples."""

import numpy as np
import pytest

from minisaobp import metrics
from minisaobp.nn import Bert, Config, Gpt2
from minisaobp.text.task_examples import encode_task
from minisaobp.text.task_files import Example
from minisaobp.text.tasks import TASKS
from minisaobp.text.tokenizer import train_bpe, train_wordpiece
from minisaobp.training import task as task_module
from minisaobp.training.task import attention_on, predict, zero_shot

TEXT = [("x", "The boat sails. The boat swims. Who sails a boat? Nobody at all, said Ada, and she laughed. " * 4)]


@pytest.fixture(scope="module")
def decoder():
    tokenizer = train_bpe(TEXT, 320)
    config = Config(320, 16, 2, 2, 32, 48, model_type="gpt2", attention_variant="high", initializer_range=0.3)
    return Gpt2.initialise(config, np.random.default_rng(0), np.float64), tokenizer


EXAMPLES = [
    Example("a", "The boat sails.", "Who sails?", 0, ("The boat", "Ada", "Nobody at all", "she")),
    Example("b", "The boat swims. " * 9, "Ada _ .", 1, ("laughed", "sails a boat", "swims", "said")),
]


def log_likelihood(model, before, choice):
    """One token after the other, from the logits of the whole sequence."""
    ids = np.array([before + choice])
    logits = model.logits(ids)[0]
    total = 0.0
    for place, token in enumerate(choice, len(before)):
        row = logits[place - 1]
        total += row[token] - np.log(np.exp(row).sum())
    return total


def test_zero_shot_takes_the_likeliest_choice(decoder):
    model, tokenizer = decoder
    plain, normalised, cut = zero_shot(model, tokenizer, TASKS["race"], EXAMPLES, 48)
    assert cut == 1  # the second prompt does not fit
    for n, example in enumerate(EXAMPLES):
        prompt, choices = TASKS["race"].prompt(example)
        before = tokenizer.encode(prompt).ids
        choices = [tokenizer.encode(choice).ids for choice in choices]
        scores = np.array([log_likelihood(model, before[-(48 - len(choice)) :], choice) for choice in choices])
        assert plain[n] == scores.argmax()
        assert normalised[n] == (scores / [len(choice) for choice in choices]).argmax()
        got, lengths, _ = task_module._choices(model, tokenizer, 48, prompt, TASKS["race"].prompt(example)[1])
        # float64 throughout; the batch pads, so sums are ordered otherwise
        assert np.allclose(got, scores, rtol=1e-12) and lengths.tolist() == [len(choice) for choice in choices]
    assert (plain != normalised).any()  # else nothing here tells the two apart


def test_a_choice_that_does_not_fit_is_cut(decoder):
    model, tokenizer = decoder
    got, lengths, cut = task_module._choices(model, tokenizer, 8, "The boat", [" sails." * 20, " a"])
    assert cut and lengths.tolist() == [7, 1] and np.isfinite(got).all()


def test_interrupted_it_gives_what_was_scored(decoder):
    import signal

    class Pressing:
        @staticmethod
        def prompt(example):
            if example.id == "b":
                signal.raise_signal(signal.SIGINT)
            return TASKS["race"].prompt(example)

    plain, normalised, _ = zero_shot(*decoder, Pressing, EXAMPLES * 3, 48)
    assert len(plain) == len(normalised) == 2


def test_prompts_of_the_tasks():
    assert TASKS["boolq"].prompt(Example(0, "is it", "It is.", 1)) == (
        "It is.\n\nQuestion: is it?\nAnswer:", [" no", " yes"]
    )  # fmt: skip
    assert TASKS["hellaswag"].prompt(Example(0, "A man", None, 1, ("runs", "eats")))[1] == [" runs", " eats"]
    assert TASKS["sst2"].prompt is None


def test_attention_of_choices_is_that_of_their_sequences():
    tokenizer = train_wordpiece(TEXT, 150)
    config = Config(tokenizer.get_vocab_size(), 16, 2, 2, 32, 32, head="multiple_choice", initializer_range=0.3)
    model = Bert.initialise(config, np.random.default_rng(0))
    encoded = encode_task(EXAMPLES, tokenizer, 32)
    found = attention_on(model, encoded, 2)
    batch = encoded.rows(slice(0, 2))
    maps = model.attention_maps(batch.ids, batch.attention_mask, batch.token_type_ids)
    assert maps.shape[1] == 8
    valid = batch.attention_mask.reshape(8, 1, -1)
    assert np.allclose(found["gtd"]["layers"], metrics.gtd(maps, valid=valid).mean(axis=(1, 2)), rtol=1e-6)
    entropy = metrics.attention_entropy(maps, valid=valid)
    assert found["entropy"]["mean"] == pytest.approx(entropy.mean(), rel=1e-6) and found["examples"] == 2
    assert predict(model, encoded).shape == (2,)
