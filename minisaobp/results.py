"""What every recorded number stands beside: the machine and the versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from . import __version__


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


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
