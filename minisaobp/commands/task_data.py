"""What finetune and evaluate share: a task's files found and read, or one clear line."""

from typing import NamedTuple


class Split(NamedTuple):
    """One file of a task."""

    path: str
    examples: list
    skipped: dict  # {kind: count} of bad lines that --skip-bad left out
    official: int | None  # how many examples the official file has; None of a file of one's own

    @property
    def record(self):
        """What a result says of it, JSON."""
        counts = {"examples": len(self.examples), "official_examples": self.official}
        return {"file": str(self.path)} | counts | {"skipped": dict(self.skipped)}


def read_splits(task, data, wanted, own, skip_bad, fail):
    """{split: Split} of the splits that are there. wanted: those that must be; own: {split: file} in place of them."""
    splits = {}
    for split in task.files:
        path = own.get(split) or task.find(data, split)
        if path is None:
            if split in wanted:
                fail(
                    f"argument --data: {data} has no {task.where(split)} (plain, .gz or .xz); data/README.md says more"
                )
            continue
        try:
            examples, skipped = task.examples(path, split, skip_bad)
        except ValueError as error:
            fail(f"argument --data: {error}")
        splits[split] = Split(path, examples, skipped, None if split in own else task.rows.get(split))
    return splits


def described(split, part):
    """A line on a Split, for the terminal."""
    left_out = ", ".join(f"{count} {kind}" for kind, count in part.skipped.items())
    partly = part.official is not None and part.official != len(part.examples)
    return (
        f"{split}: {len(part.examples):,} examples from {part.path}"
        + (f", officially {part.official:,}" if partly else "")
        + (f", SKIPPED {left_out}" if left_out else "")
    )


def dev_of(task):
    """The split that decides."""
    return next(split for split in task.files if split.startswith("dev"))
