"""For all tests. NumPy's matrix products have one thread: on sizes as small as the tests' a second one mostly waits.

Modules that need a package which is not everybody's are not searched for doctests where it is absent.
"""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy is imported, also by processes that tests start

collect_ignore = [] if find_spec("nbgrader") else ["minisaobp/course/kit.py", "minisaobp/course/preprocessors.py"]
