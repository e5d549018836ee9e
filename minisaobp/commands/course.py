"""course: problem sets that grade themselves, built for students and graded with nbgrader."""

import sys
from pathlib import Path

from . import options

NAME, HELP = "course", "build the problem sets of a course, and grade what students hand in"
DESCRIPTION = (
    "build: make the students' notebooks (release/) and the teacher's (source/) in DIR. grade: grade "
    "DIR/submitted/STUDENT/SET/SET.ipynb into DIR/grades.csv and DIR/feedback/. Needs `pip install -e .[course]`."
)


def add(parser):
    add = parser.add_argument
    add("what", choices=["build", "grade"], help="build the sets, or grade submissions")
    add("dir", metavar="DIR", help="the folder of the course")
    add("--source", metavar="DIR", help="build: problem sets of your own (default: notebooks/course)")
    add("--seconds", type=options.real(0.1, 3600), default=20, help="a cell may take (default: %(default)s)")
    add("--memory", type=options.whole(256, 10**6), default=2048, metavar="MB",
        help="a student's process may take (default: %(default)s)")  # fmt: skip
    add("--user", metavar="NAME", help="account that runs the students' code (needs root; default: your own)")


def run(args, fail):
    if sys.platform == "win32":
        fail("needs Linux or macOS: the limits of a student's process are Unix's (WSL will do)")
    _check_user(args.user, fail)
    if args.source and args.what == "grade":
        fail("argument --source: of build alone; grade uses the source/ that build made in DIR")
    try:
        from ..course import kit
        from ..course.process import Limits
    except ImportError as error:
        fail(f"{error.name} is not installed: pip install -e .[course]")
    from tqdm import tqdm

    limits = Limits(args.seconds, args.memory, args.user)
    try:
        if args.what == "build":
            course = options.writable_folder(args.dir, ("nbgrader_config.py", "gradebook.db"), fail)
            points = kit.build(course, limits, print, args.source or kit.SOURCE)
            print(f"Wrote {course / 'release'} (for students) and {course / 'source'} (yours): {len(points)} sets")
            return
        course = Path(args.dir)
        grades, failed = kit.grade(course, limits, tqdm.write, lambda found: tqdm(found, unit="submission"))
    except kit.Bad as error:
        fail(str(error))
    for row in grades:
        if row.problem == "total":
            print(f"{row.student}, {row.set}: {row.score:g} of {row.points:g} {row.note and f'({row.note})'}".rstrip())
    print(f"Wrote {course / 'grades.csv'} and {course / 'feedback'}")
    if failed:
        fail(f"{len(failed)} of the submissions could not be graded and have no row in grades.csv: {failed[0]}")


def _check_user(name, fail):
    if name is None:
        return
    import os
    import pwd

    try:
        pwd.getpwnam(name)
    except KeyError:
        fail(f"argument --user: no account {name!r} on this machine")
    if os.geteuid() != 0:
        fail("argument --user: only root may run code as somebody else")
