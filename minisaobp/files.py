"""Files that are whole or not there at all."""

import contextlib
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


@contextlib.contextmanager
def alone_in(folder):
    """Inside, no other process is inside for the same folder; BlockingIOError if one is. It ends with the process.

    Where the system, or a file system, knows no such lock, nothing is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


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


def append_json(path, value):
    """A line of JSON at the end of a file, on the disk when this returns; half of it may be there after a crash."""
    text = json.dumps(value, allow_nan=False) + "\n"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # a full disk: which file does not fit on it
            error.filename = str(path)
        raise
