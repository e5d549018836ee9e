"""A study's own Python file, in force during the runs of its arms and at no other time."""

import contextlib
import hashlib
import sys
from inspect import getattr_static
from pathlib import Path

from .training import task  # noqa: F401  what a run is made of is loaded from now on, and so seen by `_definitions`


class LeftChanged(ValueError):
    """A patch that changed the package for longer than it was open."""


class Patch:
    """A file with a context manager `patched()`, read once: what is in force is what `sha256` is of.

    Raises ValueError that says what is wrong with the file.
    """

    def __init__(self, folder, name):
        self.path = Path(folder, name)
        if not self.path.is_file():
            raise ValueError(f"expected a Python file beside the study's, found no {name}")
        try:
            self.source = self.path.read_text(encoding="utf-8")  # with the same line ends on every system
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: expected UTF-8 ({error})") from None
        self.sha256 = hashlib.sha256(self.source.encode()).hexdigest()
        with self.open():
            pass

    @contextlib.contextmanager
    def open(self):
        """In force inside. Raises ValueError if it cannot be, or if it leaves a trace: the other arms would see it."""
        before = _definitions()

        def check(kind=None, *_):
            if kind is not None and not issubclass(kind, Exception):  # Ctrl-C, after which there is no other arm
                return
            if kind is not None and issubclass(kind, LeftChanged):  # a patch that was opened after this one did it
                return
            for name, value in _definitions().items():
                if before.get(name, value) is not value:
                    raise LeftChanged(
                        f"{self.path} leaves {name} changed outside patched(), where other arms would see it"
                    )

        with contextlib.ExitStack() as stack:
            stack.push(check)
            try:
                namespace = {"__name__": self.path.stem, "__file__": str(self.path)}
                exec(compile(self.source, self.path, "exec"), namespace)
                context = namespace["patched"]()
                check()
                stack.enter_context(context)
            except LeftChanged:
                raise
            except Exception as error:  # whatever the file does
                problem = f"{type(error).__name__}: {error}"
                raise ValueError(f"expected a context manager patched() in {self.path} ({problem})") from None
            yield


def _definitions():
    """What the package's modules and classes define, {name: object}: without what is made when it is first needed."""
    found = {}
    for module, loaded in list(sys.modules.items()):
        if module.partition(".")[0] == __package__:
            for name, value in list(vars(loaded).items()):
                found[f"{module}.{name}"] = value
                if isinstance(value, type) and value.__module__ == module:
                    found |= {f"{module}.{name}.{part}": getattr_static(value, part) for part in dir(value)}
    return {name: value for name, value in found.items() if value is not None and "__" not in name}
