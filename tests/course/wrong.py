"""Wrong submissions: for every problem, what students hand in, and what those hand in who try the grader.

A submission is the notebook with the solutions in which the answer to one problem is wrong in one way.
"""

import copy
import re

from minisaobp.course.submission import is_test

# problem: an example call whose answer the visible tests give away; slips (what the name says: text of the solution,
# and what it becomes)
SETS = {
    "set1_belief_propagation": {
        "p1": ("message(np.array([0.9, 0.1]), AGREE)", {
            "wrong axis": ("phi @ psi", "psi @ phi"),
            "off by one": ("phi @ psi", "phi[:-1] @ psi[:-1]"),
            "not normalised": ("m / m.sum()", "m"),
        }),
        "p2": ("belief(np.array([0.5, 0.5]), np.array([[0.7, 0.3], [0.6, 0.4]]))", {
            "wrong axis": ("np.prod(messages, axis=0)", "np.prod(messages, axis=1)"),
            "off by one": ("np.prod(messages, axis=0)", "np.prod(messages[1:], axis=0)"),
            "a sum": ("np.prod(messages, axis=0)", "np.sum(messages, axis=0)"),
            "no prior": ("phi * np.prod", "np.prod"),
        }),
        "p3": ("chain(RAIN, WET)", {
            "wrong axis": ("b / b.sum(axis=1, keepdims=True)", "b / b.sum(axis=0, keepdims=True)"),
            "off by one": ("for v in range(n - 1):", "for v in range(n - 2):"),
            "transposed": ("psi[v - 1] @ (", "psi[v - 1].T @ ("),
            "one way": ("phi * right * left", "phi * right"),
            "brute force": ("    n = len(phi)\n", "    return enumerated(phi, psi)\n    n = len(phi)\n"),
        }),
        "p4": ("triangle(np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]), AGREE, 1)", {
            "wrong axis": ("b / b.sum(axis=1, keepdims=True)", "b / b.sum(axis=0, keepdims=True)"),
            "off by one": ("range(steps)", "range(steps - 1)"),
            "echo": ("(phi[u] * before[w, u])", "(phi[u] * before[w, u] * before[v, u])"),
            "one after another": ("before = dict(told)", "before = told"),
        }),
    },
    "set2_saobp": {
        "p1": ("messages(EXAMPLE, LAM)", {
            "wrong axis": ("A.sum(axis=-1, keepdims=True)", "A.sum(axis=0, keepdims=True)"),
            "off by one": ("(A.sum(axis=-1, keepdims=True) - A)", "A.sum(axis=-1, keepdims=True)"),
            "attracts": ("np.exp(lam)", "np.exp(-lam)"),
        }),
        "p2": ("algorithm1(EXAMPLE, LAM)", {
            "wrong axis": ("        B[j] /= B[j].sum()\n    return B", "    return B / B.sum(axis=0)"),
            "off by one": ("for i in range(L):", "for i in range(L - 1):"),
            "Eq. 11 as printed": ("if i != j", "if True"),
            "line 5 as printed": ("if i != j:\n                    B[j, k] *= m[i, k]", "if i == k:\n"
                                  "                    B[j, k] *= m[j].prod() / m[j, k]"),
        }),
        "p3": ("refine(EXAMPLE, LAM)", {
            "wrong axis": ("B / B.sum(axis=-1, keepdims=True)", "B / B.sum(axis=-2, keepdims=True)"),
            "off by one": ("m.prod(axis=-2", "m[..., 1:, :].prod(axis=-2"),
            "Eq. 11 as printed": ("keepdims=True) / m\n", "keepdims=True)\n"),
            "first axis": ("m.prod(axis=-2, keepdims=True)", "m.prod(axis=0, keepdims=True)"),
        }),
        "p4": ("refine_safely(EXAMPLE, LAM)", {
            "wrong axis": ("log_t.sum(axis=-2", "log_t.sum(axis=-1"),
            "off by one": ("log_t.sum(axis=-2", "log_t[..., :-1, :].sum(axis=-2"),
            "no maximum": ("scores - scores.max(axis=-1, keepdims=True)", "scores"),
            "logarithm of 0": ("np.log(A) +", "np.log(A + 1e-300) +"),
        }),
        "p5": ("mended(PRINTED, EXAMPLE, LAM)", {
            "wrong axis": ("return B / B.sum(axis=-1, keepdims=True)", "return B / B.sum(axis=0, keepdims=True)"),
            "multiplied": ("B = B / (A", "B = B * (A"),
            "off by one": ("keepdims=True) - A))", "keepdims=True)))"),
        }),
    },
    "set3_backward": {
        "p1": ("softmax_backward(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]]))", {
            "wrong axis": ("(B * dB).sum(axis=-1", "(B * dB).sum(axis=0"),
            "off by one": ("(B * dB).sum", "(B * dB)[..., 1:].sum"),
            "unweighted": ("(B * dB).sum", "dB.mean"),
        }),
        "p2": ("refine_backward(np.random.default_rng(2).standard_normal((3, 3)), attention(3, seed=2), 0.0)", {
            "wrong axis": ("dl.sum(axis=0) - dl", "dl.sum(axis=1, keepdims=True) - dl"),
            "off by one": ("dl.sum(axis=0) - dl", "dl.sum(axis=0)"),
            "wrong sign": ("- dlog_t * c / t", "+ dlog_t * c / t"),
            "0 / 0": ("ratio * centred - dlog_t", "dl / A - dlog_t"),
        }),
        "p3": ("lam_gradient(EXAMPLE_DB, EXAMPLE_A, 0.0)", {
            "wrong axis": ("dl.sum(axis=0) - dl", "dl.sum(axis=1) - dl"),
            "off by one": ("dl.sum(axis=0) - dl", "dl.sum(axis=0)"),
            "wrong sign": ("return -np", "return np"),
            "chain rule": ("np.exp(-lam) / t", "1 / t"),
        }),
        "p4": ("attend_backward(np.ones((3, 2)), np.ones((3, 4)), np.ones((1, 4)), np.ones((1, 2)))", {
            "wrong axis": ("(A * dA).sum(axis=-1, keepdims=True)", "(A * dA).sum(axis=0, keepdims=True)"),
            "off by one": ("1 / np.sqrt(Q.shape[-1])", "1 / np.sqrt(Q.shape[-1] - 0.5)"),
            "transposed": ("ds.T @ Q", "ds @ Q"),
            "no scale": ("ds @ K * scale", "ds @ K"),
        }),
    },
    "set4_gtd": {
        "p1": ("indirect(np.eye(4), 0.9, 4)", {
            "wrong axis": ("path @ A", "path.T @ A"),
            "off by one": ("range(2, hops + 1)", "range(2, hops)"),
            "entry by entry": ("path @ A", "path * A"),
            "weights": ("beta ** (t - 1)", "beta**t"),
        }),
        "p2": ("gtd(np.eye(4), 0.9, 4)", {
            "wrong axis": ("np.sum(A**2)", "np.sum(A**2, axis=0)"),
            "off by one": ("range(2, hops + 1)", "range(2, hops)"),
            "not squared": ("return np.sum(G**2) / (np.sum(A**2) + np.sum(G**2))",
                            "return np.sum(G**2) ** 0.5 / (np.sum(A**2) ** 0.5 + np.sum(G**2) ** 0.5)"),
        }),
        "p3": ("indirect_entropy(UNIFORM, 0.9, 4)", {
            "wrong axis": ("G / G.sum(axis=-1, keepdims=True)", "G / G.sum(axis=0, keepdims=True)"),
            "off by one": ("range(2, hops + 1)", "range(2, hops)"),
            "bits": ("np.log(np.where", "np.log2(np.where"),
            "0 log 0": ("np.log(np.where(G > 0, G, 1))", "np.log(G)"),
        }),
        "p4": ("above_collapse(16)", {
            "wrong axis": ("return A", "return A.T"),
            "off by one": ("1 / half", "1 / (half + 1)"),
            "a collapse": ("A[half:, :half] = 1 / half", "A[half:, 0] = 1"),
        }),
    },
}  # fmt: skip

# behind a right answer `f`, whose value at the example is `known`
BAD_MANNERS = {
    "endless loop": "def f(*a):\n    while True:\n        __import__('time').sleep(0.01)\n",
    "sys.exit": "def f(*a):\n    __import__('sys').exit(0)\n",
    "os._exit": "def f(*a):\n    __import__('os')._exit(0)\n",
    "hard-coded": "known = EXAMPLE_CALL\n\n\ndef f(*a):\n    return known\n",
    "one size": "right, known = f, []\n\n\ndef f(*a):\n    known.append(np.shape(a[0]) or a[0])\n"
                "    result = right(*a)\n    if known[0] == known[-1]:\n        return result\n"
                "    return tuple(0 * r for r in result) if isinstance(result, tuple) else 0 * result\n\n\n"
                "EXAMPLE_CALL\n",
    "wrong dtype": "right = f\n\n\ndef f(*a):\n    result = right(*a)\n"
                   "    if isinstance(result, tuple):\n        return tuple(np.float32(r) for r in result)\n"
                   "    return np.float32(result)\n",
    "mutated input": "right = f\n\n\ndef f(*a):\n    result = right(*a)\n    for x in a:\n"
                     "        if isinstance(x, np.ndarray):\n            x += 1\n    return result\n",
}  # fmt: skip
# the same in the place of every function of a set, knowing nothing of it
TRIVIAL = {
    "the first argument": "return a[0]",
    "the last argument": "return a[-1]",
    "zeros": "return np.zeros(np.shape(a[0]))",
    "uniform": "L = np.shape(a[0]) or (a[0], a[0])\n    return np.full(L, 1 / L[-1])",
    "identity": "return np.eye(np.shape(a[0])[-1] if np.shape(a[0]) else a[0])",
}
DIFFERENCES = {  # what the helpers of set 3 offer to those who do not derive
    "p1": "def softmax_backward(dB, B):\n    return numeric(softmax, np.log(B), dB)",
    "p2": "def refine_backward(dB, A, lam):\n    return numeric(lambda A: refine(A, lam), A, dB)",
    "p3": "def lam_gradient(dB, A, lam):\n    return numeric(lambda lam: refine(A, lam), np.array(lam), dB)[()]",
    "p4": "def attend_backward(dO, Q, K, V):\n    return (numeric(lambda Q: attend(Q, K, V), Q, dO),\n"
          "            numeric(lambda K: attend(Q, K, V), K, dO), numeric(lambda V: attend(Q, K, V), V, dO))",
}  # fmt: skip
NO_ARRAY_GIVEN = {("set4_gtd", "p4")}  # nothing to write into


def by_identity(nb):
    return {cell.metadata.nbgrader.grade_id: cell for cell in nb.cells}


def submissions(name, solved):
    """{(problem, what is wrong): notebook} for a set; solved: the teacher's notebook."""
    made = {}
    if name == "set4_gtd":
        solved = with_answer(solved, "p5", "")  # a picture that takes longer than all the rest
    for problem, (example, slips) in SETS[name].items():
        answer = by_identity(solved)[f"{problem}-answer"].source
        for slip, (old, new) in slips.items():
            assert old in answer, f"{name} {problem}: the solution has no {old!r}"
            made[problem, slip] = with_answer(solved, problem, answer.replace(old, new))
        function = example.partition("(")[0]
        for manner, code in BAD_MANNERS.items():
            if manner == "mutated input" and (name, problem) in NO_ARRAY_GIVEN:
                continue
            code = re.sub(r"\bf\b", function, code).replace("EXAMPLE_CALL", example)
            made[problem, manner] = with_answer(solved, problem, answer + "\n\n\n" + code)
        nb = with_answer(solved, problem, f"def {function}(*a):\n    return None")
        for cell in nb.cells:
            if is_test(cell) and cell.metadata.nbgrader.grade_id.startswith(problem):
                cell.source = "assert True"
                cell.metadata.nbgrader.points = 1000
        made[problem, "tests tampered with"] = nb
    return made


def worthless(name, solved):
    """{what it is: notebook} that should score nothing at all."""
    functions = {problem: example.partition("(")[0] for problem, (example, _) in SETS[name].items()}
    answers = {
        what: {problem: f"def {function}(*a):\n    {body}" for problem, function in functions.items()}
        for what, body in TRIVIAL.items()
    }
    if name == "set3_backward":
        answers["differences"] = DIFFERENCES
    made = {}
    for what, by_problem in answers.items():
        made[what] = with_answer(solved, "p5", "") if name == "set4_gtd" else solved
        for problem, source in by_problem.items():
            made[what] = with_answer(made[what], problem, source)
        for cell in made[what].cells:
            if cell.metadata.nbgrader.grade_id == "p5-letter":
                cell.source = 'bug = "a"'
    return made


def with_answer(nb, problem, source):
    """A copy of a notebook with another answer to a problem."""
    nb = copy.deepcopy(nb)
    by_identity(nb)[f"{problem}-answer"].source = source
    return nb
