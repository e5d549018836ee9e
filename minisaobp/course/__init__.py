"""The course kit: problem sets in nbgrader's format, built for students and graded in processes of their own.

notebooks/course/ holds the source of the sets. `kit` builds and grades, `submission` puts what a student hands in back
into the form that was handed out, `grader` runs it and the tests, `process` holds the process a student's code runs in,
and `student` is what runs there.

A submission is not trusted. Its code runs in one process, the tests run in another, and only numbers, arrays and text
pass between them: nothing that a student redefines, prints or raises can reach a test, and no hidden test can be read.
"""
