"""Every known reading of the paper, and every known fault, as what it computes: the judge's dictionary.

A reading of a refinement is a set of switches of `refined`, which computes all of them in one place, in logarithms and
float64, so that two faults at once are two sets of switches together. Nothing here is fast or overflows.

Axis letters: B batch, H heads, L tokens; i sends, j receives, k is the label.
"""

import dataclasses
from typing import Any

import numpy as np

from ..bp import refine
from ..bp.refinement import VARIANTS, normalise_rows, visible_entries

POTTS = ("high", "low")


@dataclasses.dataclass(frozen=True)
class Reading:
    """name: for --json; words: what was computed; paper: the line it concerns; forms: switches, in each known form."""

    name: str
    words: str
    paper: str
    forms: tuple  # of dictionaries of switches, alike but for what no paper decides (a constant, a mask)
    variants: tuple = POTTS
    causal: Any = None  # None if it concerns both


READINGS = (
    Reading(
        "self-message",
        "Eq. 11 with the self message: the belief of token j is multiplied by j's own message to itself as well",
        "Eq. 11 as printed runs over all i; Algorithm 1 divides m_j out, and the graph has no factor between j and j",
        ({"hears_itself": True},),
    ),
    Reading(
        "row-product",
        "Algorithm 1 taken literally: the product runs over the labels of one row (a number that cancels), so that no "
        "message of another token arrives",
        "Algorithm 1, line 5 prints P_i = prod_k m_i(k); Eq. 11 has the product over the tokens i for a fixed label k",
        ({"heard": "own row"},),
    ),
    Reading(
        "sign-of-lambda",
        "the sign of lambda: the factor attracts where it should repel, or the other way round",
        "Eq. 7 (BP-High) has e^lambda where r != k, Eq. 16 (BP-Low) e^-lambda",
        ({"sign": -1},),
    ),
    Reading(
        "eq6-positive-beta",
        "Eq. 6 with a positive beta = lambda, which attracts (after normalisation the same function as a wrong sign)",
        "Eq. 7 is e^lambda times Eq. 6 at beta = -lambda",
        ({"sign": -1},),
    ),
    Reading(
        "lambda-for-exp",
        "lambda used where e^lambda belongs",
        "Eq. 9: m_i(k) = A_ik + e^lambda (S_i - A_ik), with psi of Eq. 7",
        ({"message": "lambda"}, {"message": "1 - lambda A"}),
    ),
    Reading(
        "first-order",
        "only the first order in A: exp(-c sum_i A_ik) in place of the product of messages",
        "Eq. 11 multiplies the messages of Eq. 9; the first order errs by 1e-3",
        ({"message": "first order"}, {"message": "first order in lambda"}),
    ),
    Reading(
        "over-columns",
        "normalised over columns: each column sums to 1, not each row",
        "Eq. 11: b_j(k) is a distribution over the labels k, the row of token j",
        tuple({"over": over, "hidden": h} for over in ("columns of messages", "columns of t") for h in (False, True)),
    ),
    Reading(
        "transposed",
        "transposed: rows and columns are exchanged, in what goes in, in the messages or in what comes out",
        "Eq. 8: the prior of node i is row i of A; Eq. 11 returns row j as the belief of node j",
        (
            {"turned": "output"},
            *({"turned": t, "sums": sums} for t in ("input", "both") for sums in ("normalised", "kept", "one")),
            *({"turned": "messages", "sums": sums} for sums in ("kept", "one")),
        ),
    ),
    Reading(
        "prior-left-out",
        "the prior left out: a row is the normalised product of messages alone",
        "Eq. 11: b_j(k) = phi_j(k) prod_i m_i(k), with the prior phi_j(k) = A_jk of Eq. 8",
        ({"prior": False}, {"prior": False, "hidden": False}),
    ),
    Reading(
        "not-normalised",
        "not normalised: every row is the right one times a number",
        "Eq. 11 and the last line of Algorithm 1 divide by the sum over the labels",
        ({"over": "nothing"},),
        VARIANTS,
    ),
    Reading(
        "future-leaks",
        "future messages leak: token j hears the tokens after it as well, through the product over a whole column",
        "Appendix C: messages from future tokens are blocked, so token j hears only i < j",
        ({"heard": "all"},),
        causal=True,
    ),
    Reading(
        "causal-for-encoder",
        "the causal form, where the encoder's was asked for",
        "Appendix C is about the decoder; in an encoder every token hears every other",
        ({"causal": True}, {"heard": "past"}),
        causal=False,
    ),
    Reading(
        "padded-rows-send",
        "padded rows send: the attention rows of padded tokens count as messages",
        "Eq. 11 runs over the tokens of the sequence, and padding is none of them",
        ({"padding_sends": True},),
    ),
    Reading(
        "two-steps",
        "two steps of belief propagation in place of one",
        "Algorithm 1 is one step from uniform messages",
        ({"steps": 2},),
    ),
    Reading(
        "fed-back",
        "the belief fed back as prior: the refinement is applied to its own result",
        "Eq. 8: the prior is the attention row; Algorithm 1 ends with the first belief",
        ({"again": True},),
    ),
    Reading(
        "elemmul-as-power",
        "BP-ElemMul as A A, A^T A or the square of every entry",
        "Eq. 15: B_ij = (1/Z_i) sum_k A_ik A_jk, the rows of A A^T normalised",
        ({"product": "A A"}, {"product": "A^T A"}, {"product": "A * A"}),
        ("elemmul",),
    ),
    Reading(
        "elemmul-without-mask",
        "BP-ElemMul without the mask: weight returns to later or to padded tokens",
        "Eq. 15: A A^T is symmetric before it is normalised, so what Appendix C and the padding hide is hidden again",
        ({"hidden": False}, {"padding_sends": True}),
        ("elemmul",),
    ),
    Reading(
        "unchanged",
        "the attention itself, rows normalised: no refinement",
        "Algorithm 1 returns the belief b_j, not the prior phi_j",
        ({"variant": "original"},),
        ("high", "low", "elemmul"),
    ),
    Reading(
        "elemmul",
        "BP-ElemMul, where a Potts factor was asked for",
        "Eq. 15 in place of Eqs. 7 to 11",
        ({"variant": "elemmul"},),
        ("high", "low", "original"),
    ),
    Reading(
        "high-for-other",
        "BP-High, where another variant was asked for",
        "Eqs. 7 to 11",
        ({"variant": "high"},),
        ("elemmul", "original"),
    ),
)


def known(variant, causal):
    """The readings that say something else than the reference for this variant."""
    return [r for r in READINGS if variant in r.variants and r.causal in (None, causal)]


def refined(case, *, variant=None, causal=None, steps=1, again=False, **switches):
    """What a reading makes of a case: (B, H, L, L), non-finite where it depends on how it is written."""
    variant = variant or case.variant
    case = case if causal is None else dataclasses.replace(case, causal=causal)
    if steps > 1:
        if case.A.size * case.L > 1 << 22:  # beyond what several steps are computed for
            return np.full(case.A.shape, np.nan)
        return refine(case.A, case.lam, **case.options | {"variant": variant}, steps=steps)
    visible = visible_entries(case.A, case.causal, case.valid)
    turned = switches.get("turned")
    A = case.A
    if turned in ("input", "both"):
        A, visible = A.swapaxes(-1, -2), None
    P = A if switches.get("sums", "normalised") != "normalised" else normalise_rows(A, visible)[0]
    for _ in range(2 if again else 1):
        P = _one_refinement(case, P, variant, visible, **switches)
    return P.swapaxes(-1, -2) if turned in ("output", "both") else P


def _one_refinement(
    case,
    P,
    variant,
    visible,
    *,
    sign=1,
    message="potts",
    prior=True,
    over="rows",
    heard="others",
    hears_itself=False,
    padding_sends=False,
    hidden=True,
    product="A A^T",
    turned=None,
    sums="normalised",
):
    visible = np.broadcast_to(True if visible is None else visible, P.shape)
    senders = P
    if padding_sends:  # the rows of padded tokens as they were given, over the keys that they may see
        senders, _ = normalise_rows(case.A, np.tri(case.L, dtype=bool) if case.causal else None)
    if variant == "original":
        return P
    if variant == "elemmul":
        T = P.swapaxes(-1, -2)
        M = {"A A^T": senders @ senders.swapaxes(-1, -2), "A A": P @ P, "A^T A": T @ P, "A * A": P * P}[product]
        return _normalised(M * visible if hidden and not padding_sends else M, "rows")
    lam = np.asarray(case.lam) * (sign if variant == "high" else -sign)
    log_m, negative = _log_messages(senders.swapaxes(-1, -2) if turned == "messages" else senders, lam, message, sums)
    if heard == "own row":
        log_heard, odd, count = -log_m, negative, 0
    else:
        hears = np.tri(case.L) if heard == "past" or (case.causal and heard != "all") else np.ones((case.L, case.L))
        np.fill_diagonal(hears, 1.0 if hears_itself else 0.0)
        log_heard, odd, count = hears @ log_m, hears @ negative, hears.sum(-1, keepdims=True)
    if over == "columns of t":  # without the constant e^lambda of every message
        log_heard = log_heard - count * lam
    l = log_heard + (np.log(P) if prior else 0.0)
    return _normalised(np.where(visible, l, -np.inf) if hidden or prior else l, over, odd)


def _log_messages(P, lam, message, sums):
    """log |m_i(k)| of Eq. 9 and whether m is negative, 1.0 or 0.0; both (..., L, L). An empty row sends 1."""
    total = P.sum(-1, keepdims=True)
    S = total if sums != "one" else np.ones_like(total)
    if message == "first order":
        m = np.exp(np.expm1(-lam) * P)
    elif message == "first order in lambda":
        m = np.exp(-lam * P)
    elif message == "lambda":
        m = P + lam * (S - P)
    elif message == "1 - lambda A":
        m = S - lam * P
    else:
        m = np.exp(lam) * S + (1 - np.exp(lam)) * P
    m = np.where(total > 0, m, 1.0)
    return np.where(m == 0, -1e4, np.log(abs(np.where(m == 0, 1, m)))), (m < 0) * 1.0


def _normalised(x, over, odd=None):
    """exp(x), if odd is given, else x, with its rows or its columns summing to 1. An empty row stays zero."""
    if odd is not None:
        axis = -2 if "columns" in over else -1
        top = x.max(axis, keepdims=True)
        x = np.exp(x - np.where(np.isfinite(top), top, 0)) * np.where(odd % 2, -1, 1)
    if "columns" in over:
        total = x.sum(-2, keepdims=True)
        return x / np.where(total == 0, np.nan, total)  # a column that nobody attends to is 0/0, or guarded
    total = x.sum(-1, keepdims=True)
    return x / np.where(total == 0, 1, total)


def over_rows(B):
    """B with its rows divided by their sums: what is left of a reading that does not normalise."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = B.sum(-1, keepdims=True)
        return np.where(total == 0, 0, B / np.where(total == 0, 1, total))
