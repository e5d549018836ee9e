"""The runs of a study, each in its folder: from a Job of `minisaobp/study.py` to its line of results."""

import contextlib
import json
import sys
from pathlib import Path

from . import finetune, options, pretrain, train

MOVED = ("device", "precision", "out")  # options that a run may change while it is under way


class Runner:
    """What turns a Job into a line of results.jsonl, and its runs into folders in `folder`."""

    def __init__(self, study, args, folder, xp, fail):
        from ..results import commit

        self.study, self.args, self.folder, self.xp, self.fail = study, args, folder, xp, fail
        self.commit = commit()  # now: at the end of a run the checkout may be at another one
        self.texts = {}  # tokenised once for all runs
        self.patches = {}  # read once for all runs
        self.examples = None, None  # of the last task, and what they are of

    def asked(self, job):
        """All options of the run, as its command completes them."""
        command = finetune if job.task else pretrain if "preset" in job.options else train
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        asked = command.complete(options.from_table(job.options, command.add, refuse), refuse)
        asked |= {"device": self.args.device, "precision": self.args.precision, "out": str(self.folder / job.folder)}
        if job.task:
            return asked | {"checkpoint": str(self.folder / job.options["checkpoint"])}
        return asked | {"tokens": asked["tokens"] or str(self.folder / "tokens")}

    def check_options(self, job):
        asked = self.asked(job)
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        self.patches_of(job)
        if job.task:
            finetune.check_files(asked, refuse)
            of_model = self.asked(self.study.trained(job))
            finetune.check_model(asked, train.model_of(of_model, 2**16, refuse)[0], of_model["out"], refuse)
        else:
            config, _ = train.model_of(asked, 2**16, refuse)
            options.check_memory(config, asked["batch"], asked["length"], self.xp, refuse)

    def configuration(self, job):
        """What a result records of the options: nothing of the machine, paths as the study gives them."""
        paths = finetune.PATHS if job.task else train.PATHS
        asked = self.asked(job) | {name: job.options.get(name) for name in paths}
        configuration = {name: value for name, value in asked.items() if name not in ("out", "device", "precision")}
        return configuration | ({} if job.patch is None else {"patch": job.patch}) | self.identity(job)

    def identity(self, job):
        """What makes a run another one beside its options and its text: the content of its patch, or of each."""
        found = [patch.sha256 for patch in self.patches_of(job)]
        return {} if job.patch is None else {"patch_sha256": found[0] if isinstance(job.patch, str) else found}

    def result(self, job, results):
        """Train, or go on, in its folder: the line of that run. results: the lines of other runs."""
        from ..results import environment
        from ..sweep import line_of
        from ..training.run import Interrupted, lines_until

        folder = self.folder / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        sittings, failed = self.sittings(job), None
        try:
            if job.task and (problem := line_of(self.study.trained(job, results), results)["failed"]):
                raise FloatingPointError(f"its model failed: {problem}")
            memory = options.enough_memory(self.asked(job), lambda problem: self.fail(f"{job.name}: {problem}"))
            with memory, self.in_force(job):
                text, curves, measures = (self.tuned if job.task else self.trained)(job, folder, results)
        except ValueError as error:
            self.fail(f"{job.name}: {error}")
        except FloatingPointError as error:
            failed, measures, curves = str(error), {}, lines_until(folder / "metrics.jsonl", float("inf"))
            text = None
        except Interrupted as interrupt:
            if not self.args.check:  # which begins anew
                print(f"\n{interrupt}\nThe same command goes on.", file=sys.stderr)
            raise
        return {
            "stage": job.stage,
            "arm": job.arm,
            "seed": job.seed,
            "configuration": self.configuration(job),
            "text": text,
            **sittings[-1],
            "earlier": sittings[:-1],
            **({"model": self.sittings_of(self.study.trained(job, results))} if job.task else {}),
            "environment": environment(),
            "failed": failed,
            "curves": curves,
            "measures": measures,
        }

    def sittings(self, job):
        """What computes the run, and before that what else began it or went on with it: kept in its folder."""
        from ..files import write_json
        from ..results import device_name

        now = {"commit": self.commit, "device": device_name(self.xp), "precision": self.args.precision}
        before = [one for one in self.sittings_of(job) if one != now] if self.is_under_way(job) else []
        write_json(self.folder / job.folder / "sittings.json", [*before, now])
        return [*before, now]

    def sittings_of(self, job):
        """What the folder of a run says of them; of a model it may be more than its line does, if it was made again."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / job.folder / "sittings.json").read_text(encoding="utf-8"))
        return []

    def patches_of(self, job):
        """The list of each Patch of a run, in the order in which they are opened."""
        from ..patch import Patch

        names = [job.patch] if isinstance(job.patch, str) else job.patch or []
        for name in names:
            if name not in self.patches:
                try:
                    self.patches[name] = Patch(Path(self.args.config).parent, name)
                except ValueError as error:
                    self.fail(f"{job.name}: patch: {error}")
        return [self.patches[name] for name in names]

    @contextlib.contextmanager
    def in_force(self, job):
        """A context in which each patch of the run is open."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches_of(job):
                stack.enter_context(patch.open())
            yield

    def trained(self, job, folder, results):
        """Fingerprint of the text, curves and final measures of a language model."""
        from ..sweep import final_measures

        asked = self.asked(job)
        text = self.text(job)
        self.check_text(job, text.fingerprint, results)
        checkpoint, about = self.stopped(job, {"options": asked, "text": text.fingerprint} | self.identity(job), folder)
        curves = train.train_in_folder(asked, text, folder, self.xp, self.fail, checkpoint, about, self.measures(text))
        return text.fingerprint, curves, final_measures(curves) | self.of_decoder(curves, text, folder)

    def tuned(self, job, folder, results):
        """The same of a model that is fine-tuned for a task."""
        asked = self.asked(job)
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        splits = finetune.splits_of(asked, refuse)
        fingerprint = finetune.fingerprint(splits)
        self.check_text(job, fingerprint, results)
        checkpoint, about = self.stopped(job, {"options": asked, "data": fingerprint} | self.identity(job), folder)
        model, tokenizer, length = finetune.model_of(asked, checkpoint is not None, self.xp, refuse)
        key = fingerprint, tokenizer.to_str(), length, asked["stride"]
        if self.examples[0] != key:
            self.examples = key, finetune.encoded(asked, splits, tokenizer, length)
        curves, record = finetune.finetune_in_folder(
            asked, model, tokenizer, splits, self.examples[1], folder, self.xp, checkpoint, about
        )
        measures = {
            f"{split}_{name}": value for split, scores in record["scores"].items() for name, value in scores.items()
        }
        dev = next(iter(record["scores"]))
        measures |= {f"dev_{name}": value for name, value in record["scores"][dev].items()}
        if record["majority"] is not None:
            measures["dev_majority"] = record["majority"]["score"]
        for name in ("entropy", "gtd", "indirect_entropy"):
            measures[name] = record["attention"][name]["layers"]
        return fingerprint, curves, measures

    def check_text(self, job, fingerprint, results):
        """Refuse a text that is another than recorded runs found in the same files."""
        names = ("corpus", "held_out", "task", "data", "train", "dev", "skip_bad")
        configuration = self.configuration(job)
        for other in results:
            same = all(other["configuration"].get(name) == configuration.get(name) for name in names)
            if same and other["text"] not in (None, fingerprint):
                self.fail(f"{job.name}: the text is not that of {other['arm']}, seed {other['seed']}, in the results")

    def text(self, job):
        """The text of a run, a Dataset. Its patch must be in force: it may be what tokenises."""
        asked = self.asked(job)
        names = (*train.PATHS, "length", "vocabulary", "model", "preset")
        key = json.dumps([job.patch, *(asked[name] for name in names)])
        if key not in self.texts:
            try:
                self.texts[key] = train.text_of(asked, train.tokenizer_of(asked, False, self.fail))
            except ValueError as error:
                self.fail(f"corpus: {error}")
        return self.texts[key]

    def stopped(self, job, expected, folder):
        """The checkpoint of this very run in the folder, None without one, and what a checkpoint says of the run.

        expected: what it must say."""
        from ..training.checkpoint import find_checkpoint

        if not self.is_under_way(job):
            return None, expected
        file, described = find_checkpoint(folder)
        about = described["about"]
        moved = {name: expected["options"][name] for name in MOVED}
        if about | {"options": about.get("options", {}) | moved} != expected:
            self.fail(f"{folder} holds a run with other options; remove it, or name another folder by --runs")
        return file, about

    def measures(self, text):
        """A function from a model to the measures of its attention by layer, and to what it has learned of lambda and
        theta; None if the study asks for none."""
        from ..backend import to_host
        from ..diagnose import by_layer, graphs_by_layer
        from ..text.batches import in_order

        if not self.study.sequences:
            return None
        examples = text.held_out.rows(slice(0, self.study.sequences))

        def measures(model):
            found = by_layer(model, in_order(examples, 32), ("entropy", "indirect_entropy", "gtd", "sparsity"))
            if self.study.graphs:
                found |= graphs_by_layer(model, text.held_out.rows(slice(0, self.study.graphs)))
            for kind in ("lam", "theta"):
                learned = [to_host(v).tolist() for name, v in model.parameters.items() if name.endswith(f".{kind}")]
                found |= {kind: learned} if learned else {}
            return found

        return measures

    def of_decoder(self, curves, text, folder):
        """What is known of a decoder alone: its perplexity per word, and its loss where it sees no later token."""
        from ..nn import from_pretrained
        from ..training.loop import Score, evaluate, evaluate_from_prefixes

        if not text.causal:
            return {}
        last = curves[-1]
        score = Score(last["held_out_loss"], last["held_out_accuracy"], last["held_out_labels"])
        found = {"word_perplexity": score.perplexity_per(text.documents[1].words())}
        if self.study.prefixes:
            model = from_pretrained(folder / "last").on(self.xp)
            batch = text.held_out.rows(slice(0, self.study.prefixes))
            found["prefix_loss"] = evaluate_from_prefixes(model, batch).loss
            found["whole_loss"] = evaluate(model, [batch]).loss
        return found

    def checkpoints(self, job):
        from ..training.checkpoint import BEFORE, LATEST

        return [self.folder / job.folder / name for name in (LATEST, BEFORE)]

    def is_under_way(self, job):
        return any(path.exists() for path in self.checkpoints(job))

    def forget_checkpoints(self, job):
        """Of a run that is complete nothing goes on any more; its models stay."""
        for path in reversed(self.checkpoints(job)):  # the latest last: what goes on from that has nothing left to do
            path.unlink(missing_ok=True)

    def has_model(self, job, line):
        """Whether the folder holds the best model of the complete run that the line records."""
        folder = self.folder / job.folder
        if self.is_under_way(job) or not (folder / "best").is_dir():
            return False
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            elsewhere = {name: value for name, value in self.asked(job).items() if name in (*MOVED, *train.PATHS)}
            same = record["options"] | elsewhere == self.asked(job) and self.identity(job).items() <= record.items()
            return same and line["text"] in (None, record["text"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
