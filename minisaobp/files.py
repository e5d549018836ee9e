"""Files that are whole or not there at all."""

import glob
import json
import os
import tempfile
from pathlib import Path


def write_whole(path, write, before_renaming=None):
    """Call write(binary file) on a file beside path, then rename: path is the old file or the new one, never half.

    before_renaming: called when all is written, to put the old file elsewhere.
    """
    path = Path(path)
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~umask())  # mkstemp's files are for the owner only
        if before_renaming is not None:
            before_renaming()
        os.replace(beside, path)
    except BaseException as error:
        os.unlink(beside)
        if isinstance(error, OSError) and error.filename is None:  # a full disk: which file does not fit on it
            error.filename = str(path)
        raise


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def unfinished(path):
    """Files that `write_whole` left behind for that path, killed before it could rename them."""
    return list(path.parent.glob(f"{glob.escape(path.name)}{'?' * 8}.part"))


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode()))
