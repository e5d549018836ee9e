"""What every recorded number stands beside: the machine, the versions and the commit."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from . import __version__


def provenance():
    """What a benchmark's numbers stand beside: {"date", "commit", "environment"}."""
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment()}


def environment():
    """Machine and versions, for the record: {name: text or number}."""
    versions = {}
    for package in ("numpy", "tokenizers", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "minisaobp": __version__,
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def commit():
    """The commit of this checkout, with a + if its files differ from it; None if that cannot be known.

    A copy without its history may be told by the environment variable MINISAOBP_COMMIT.
    """
    if "MINISAOBP_COMMIT" in os.environ:
        return os.environ["MINISAOBP_COMMIT"]
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        head, changed = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed)


def device_name(xp):
    """What computes: the GPU's name and CuPy's version, or "cpu", whose processor `environment` names."""
    if xp.__name__ == "numpy":
        return "cpu"
    return f"{xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)['name'].decode()}, CuPy {xp.__version__}"


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
