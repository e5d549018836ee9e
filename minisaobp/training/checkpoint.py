"""What a run needs to go on, in one file: weights, optimiser and a description, whole or not there at all."""

import contextlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from ..backend import array_namespace, to_host
from ..files import write_whole

LATEST, BEFORE = "checkpoint.safetensors", "checkpoint.previous.safetensors"
KIND = "minisaobp training checkpoint, version 1"


def write_checkpoint(directory, parameters, optimiser, description):
    """Write the checkpoint of a run into its directory; the one before it stays beside it.

    parameters: Parameters; optimiser: AdamW; description: what `read_checkpoint` gives back, JSON.
    """
    directory = Path(directory)
    tensors = {}
    for part, flat in (("weights", parameters.flat), ("mean", optimiser.mean), ("square", optimiser.square)):
        views = parameters.like(to_host(flat))
        tensors |= {f"{part}.{name}": np.ascontiguousarray(view) for name, view in views.items()}
    checksum = _checksum(parameters, optimiser)
    described = json.dumps(description | {"steps": optimiser.steps, "checksum": checksum}, allow_nan=False)
    data = serialise(tensors, metadata={"kind": KIND, "description": described})

    def keep_the_one_before():
        with contextlib.suppress(ValueError):  # a damaged one must not take the place of the one before it
            describe_checkpoint(directory / LATEST)
            os.replace(directory / LATEST, directory / BEFORE)

    write_whole(directory / LATEST, lambda file: file.write(data), before_renaming=keep_the_one_before)


def describe_checkpoint(path):
    """The description of a checkpoint. Raises ValueError that names the file and what is wrong."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{path} is not a checkpoint of a training run")
            description = json.loads(metadata["description"])
            if not {"about", "best", "interval", "steps", "checksum"} <= description.keys():
                raise KeyError
            return description
    except (KeyError, AttributeError, json.JSONDecodeError):
        raise ValueError(f"{path} is a checkpoint without a description of its run") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint, it may be cut off ({error})") from None


def read_checkpoint(path, parameters, optimiser):
    """Fill parameters and optimiser from a checkpoint. Raises ValueError that names the tensor and both shapes, or says
    that numbers were altered, and names the checkpoint before it if that is whole.
    """
    try:
        return _read(path, parameters, optimiser)
    except ValueError as error:
        raise ValueError(f"{error}{_offer(path)}") from None


def _read(path, parameters, optimiser):
    description = describe_checkpoint(path)
    with safe_open(path, "np") as file:
        names = set(file.keys())
        for part, flat in (("weights", parameters.flat), ("mean", optimiser.mean), ("square", optimiser.square)):
            for name, view in parameters.like(flat).items():
                stored = f"{part}.{name}"
                if stored not in names:
                    raise ValueError(f"{path} has no tensor {stored}, expected one of shape {view.shape}")
                tensor = file.get_tensor(stored)
                if tensor.shape != view.shape or tensor.dtype != view.dtype:
                    raise ValueError(
                        f"{path}: {stored} is {tensor.dtype} of shape {tensor.shape}, expected {view.dtype} of shape "
                        f"{view.shape}"
                    )
                view[...] = array_namespace(view).asarray(tensor)
    if _checksum(parameters, optimiser) != description["checksum"]:
        raise ValueError(f"{path} is damaged: its numbers are not those that were written")
    optimiser.steps = description["steps"]
    return description


def _checksum(parameters, optimiser):
    total = 0
    for flat in (parameters.flat, optimiser.mean, optimiser.square):
        total = zlib.crc32(to_host(flat), total)
    return total


def find_checkpoint(path):
    """The checkpoint file that `path`, a run's directory or such a file, means, described: (file, description).

    If the last step's file is damaged, ValueError says so and names the one before it if that is whole.
    """
    path = Path(path)
    if path.is_dir():
        latest, before = path / LATEST, path / BEFORE
        path = before if before.exists() and not latest.exists() else latest  # stopped between two renames
        if not path.exists():
            raise ValueError(f"{path.parent} holds no checkpoint")
    try:
        return path, describe_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}{_offer(path)}") from None


def _offer(path):
    """What an error message adds if there is a checkpoint before that one."""
    before = Path(path).with_name(BEFORE)
    with contextlib.suppress(ValueError):
        if Path(path) != before:
            return f"; the one before it, of step {describe_checkpoint(before)['steps']}, is whole: {before}"
    return ""
