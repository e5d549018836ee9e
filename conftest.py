"""Modules that need a package which is not everybody's are not searched for doctests where it is absent."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("nbgrader") else ["minisaobp/course/kit.py", "minisaobp/course/preprocessors.py"]
