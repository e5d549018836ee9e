"""report.html of a diagnosis: one file that needs nothing else, with its figures inside."""

import base64
import html
import io
import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import STYLES, widen
from .metrics import idempotent_gtd
from .metrics.attention import DIFFUSE_ENTROPY, LOCAL_SHARE, REGIMES, SINK_SHARE, SPARSE
from .metrics.graphs import NODES, THRESHOLD

COLOURS = ("#8e44ad", "#c77f1a", "#1b998b", "#7a5230", "#d63384", "#4b7bec", "#888888", "#20303c")
MARKERS, DASHES = "vPX*h<>d", ("-.", "-", "--", ":")
COLUMNS = {
    "entropy": "entropy (nats)",
    "gtd": "GTD",
    "cross_layer_gtd": "cross-layer GTD",
    "indirect_entropy": "indirect entropy (nats)",
    "sparsity": "sparsity",
    "sink": "largest column mass",
    "local": "local share",
}
GRAPH_NAMES = {
    "clustering": "clustering, unweighted",
    "clustering_barrat": "clustering, Barrat",
    "clustering_onnela": "clustering, Onnela",
    "betweenness": "betweenness, unnormalised",
    "betweenness_weighted": "betweenness, lengths 1 / weight",
}
TRAINING_NAMES = {
    "gtd": "GTD, mean over layers",
    "cross_layer_gtd": "cross-layer GTD, mean over layers",
    "held_out_loss": "held-out loss",
    "held_out_accuracy": "held-out accuracy",
}
HATCHES = dict(zip(REGIMES, ("", "///", "...", "xx"), strict=True))
GREYS = dict(zip(REGIMES, ("#333333", "#dddddd", "#999999", "#ffffff"), strict=True))

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.warning { background: #fff3cd; border-left: 4px solid #e0a800; padding: .6em 1em; }
figcaption, .note { color: #555; font-size: .9em; }
"""


def report_html(results, examples, variants, overtime=None, missing=()):
    """The page as text. results: of `Diagnosis.result`, with "complete"; examples: {name: (N, L, L)}; variants:
    {name: attention variant or None}, which decides the colour; overtime: as of `training_correlations`, or None;
    missing: names of what was not measured any more.
    """
    styles = _styles(variants)
    parts = ["<h1>Attention diagnosis</h1>", _opening(results)]
    cut = [result["name"] for result in results if not result["complete"]]
    if cut or missing:
        words = [f"Only the sequences seen so far: {', '.join(cut)}."] if cut else []
        words += [f"Not measured: {', '.join(missing)}."] if missing else []
        parts.append(f'<p class="warning">Incomplete, interrupted. {html.escape(" ".join(words))}</p>')
    parts += ["<h2>Layers</h2>", *[_layer_table(result) for result in results]]
    parts.append(_figure(_layers(results, styles), CAPTIONS["layers"]))
    parts += ["<h2>What a GTD does not say</h2>", _reading(results[0])]
    parts += ["<h2>Kinds of heads</h2>", _regime_text(), _figure(_regimes(results), CAPTIONS["regimes"])]
    parts += ["<h2>Where entropy sits</h2>", _figure(_positions(results, styles), CAPTIONS["positions"])]
    parts.append(_figure(_last_layer(results, styles), CAPTIONS["heads"]))
    parts.append("<h2>Attention maps</h2>")
    for result in results:
        caption = f"{html.escape(result['name'])}: {CAPTIONS['maps']}"
        parts.append(_figure(_maps(result, examples[result["name"]]), caption))
    if any(result["graphs"] for result in results):
        parts += ["<h2>GTD against graph measures</h2>", _graph_text(), _correlation_table(results)]
        parts.append(_figure(_scatter(results, styles), CAPTIONS["graphs"]))
    if overtime:
        parts += ["<h2>Over training</h2>", _overtime_table(overtime)]
        parts.append(_figure(_overtime(overtime), CAPTIONS["overtime"]))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Attention diagnosis</title>'
        f'<link rel="icon" href="data:,"><style>{CSS}</style></head><body>\n{body}\n</body></html>\n'
    )


CAPTIONS = {
    "layers": "Layer-wise GTD, cross-layer GTD, attention entropy and indirect entropy (in the manner of Fig. 4). Mean "
    "over heads and sequences.",
    "regimes": "Heads of each kind, by layer.",
    "positions": "Attention entropy by the position of the query, mean over heads, first and last layer; the thin line "
    "is the largest possible, dotted for causal attention (in the manner of Fig. 7).",
    "heads": "Attention entropy of each head of the last layer (in the manner of Fig. 8).",
    "maps": "first sequence, mean over heads, square-root scale. Sparsity: the share of entries below "
    f"{SPARSE:g}, over all heads and sequences (in the manner of Fig. 6; the threshold is ours).",
    "graphs": "A point is one layer of one sequence, mean over heads, with marginal histograms (in the manner of "
    "Figs. 2 and 5).",
    "overtime": "Mean over layers of GTD and cross-layer GTD against held-out loss and accuracy; a point is one stored "
    "model (in the manner of Figs. 3 and 9; Table 6).",
}

READING = """<p>GTD is {same} (at &beta; = {beta:g} and {hops} hops) for <em>every</em> attention matrix with A&sup2;
= A: for the identity, in which no token looks at another, for the uniform matrix, in which each looks
at all, and for the collapse of all attention onto one token. It can lie above that, too. So a GTD near
{same} says nothing about collapse by itself, and a low one is not collapse. Which of the three it is,
two other columns tell: the <b>indirect entropy</b> is 0 for the identity, log L for the uniform matrix
and 0 for the collapse, and the <b>largest column mass</b> is 1/L, 1/L and 1.</p>
<p>Two readings of the paper change what refinement does to entropy. Algorithm 1, line 5, read literally
(a product over the labels of one row, not over the tokens) cancels when the row is normalised: no
message arrives, and entropy goes down. Eq. 11 as printed counts a token's message to itself, which in a
small example turns the gain of entropy into a loss.</p>
"""


def _reading(result):
    beta, hops = result["beta"], math.inf if result["hops"] is None else result["hops"]
    return READING.format(same=f"{idempotent_gtd(beta, hops):.3f}", beta=beta, hops=_hops(result))


def _hops(result):
    return "infinitely many" if result["hops"] is None else str(result["hops"])


def _opening(results):
    lines = []
    for result in results:
        L = len(result["positional_entropy"][0])
        kind = "causal" if result["causal"] else "not causal"
        heads = len(result["heads"]) // len(result["layers"])
        lines.append(
            f"<li><b>{html.escape(result['name'])}</b>: {result['sequences']:,} sequences, "
            f"{result['tokens']:,} tokens, up to {L} each; {len(result['layers'])} layers, {heads} heads; {kind}</li>"
        )
    first = results[0]
    return f"<ul>{''.join(lines)}</ul><p class='note'>GTD with &beta; = {first['beta']:g} and {_hops(first)} hops.</p>"


def _layer_table(result):
    head = "".join(f"<th>{name}</th>" for name in COLUMNS.values())
    rows = ""
    for row in result["layers"]:
        spreads = [f" &plusmn; {row[name + '_std']:.3f}" if name + "_std" in row else "" for name in COLUMNS]
        cells = [f"<td>{row[name]:.3f}{spread}</td>" for name, spread in zip(COLUMNS, spreads, strict=True)]
        rows += f"<tr><td>{row['layer']}</td>{''.join(cells)}</tr>"
    return (
        f"<h3>{html.escape(result['name'])}</h3>"
        f"<div class='scroll'><table><tr><th>layer</th>{head}</tr>{rows}</table></div>"
        "<p class='note'>Mean over heads and sequences &plusmn; standard deviation over sequences, mean over heads.</p>"
    )


def _regime_text():
    return (
        f"<p>The rule, ours, first that holds of a head's means over sequences: <b>sink</b>, one token gets "
        f"{SINK_SHARE:.0%} of all attention or more; <b>diffuse</b>, entropy at least {DIFFUSE_ENTROPY:g} of that "
        f"of uniform attention; <b>local</b>, {LOCAL_SHARE:.0%} or more of the attention goes to the token itself "
        "and its two neighbours; else <b>mixed</b>.</p>"
    )


def _graph_text():
    return (
        f"<p>The token graph of a layer: the first {NODES} tokens, an edge where (A + A&#7488;)/2 is at least "
        f"{THRESHOLD:g}, of that weight. With softmax attention such a graph is often complete; then unweighted "
        "and Barrat's clustering are 1 and unweighted betweenness is 0 whatever the weights, without any correlation: "
        "the pictures show Onnela's form and the weighted one. Undefined values are left out and counted.</p>"
    )


def _correlation_table(results):
    rows = ""
    for result in results:
        for found in result["graph_correlations"]:
            rows += f"<tr><td>{html.escape(result['name'])}: GTD and {GRAPH_NAMES[found['y']]}</td>{_cells(found)}</tr>"
    counts = ", ".join(f"{html.escape(r['name'])} {r['complete_graphs']} of {len(r['graphs'])}" for r in results)
    return f"<p>Complete graphs: {counts}.</p><div class='scroll'><table><tr><th></th>{HEAD}</tr>{rows}</table></div>"


HEAD = "<th>Pearson r</th><th>p</th><th>95% bootstrap</th><th>points</th><th>left out</th>"


def _cells(found):
    if found["r"] is None:
        return f"<td colspan=3>not defined</td><td>{found['points']}</td><td>{found['left_out']}</td>"
    low, high = found["interval"]
    return (
        f"<td>{found['r']:.3f}</td><td>{found['p']:.2g}</td><td>{low:.3f} to {high:.3f}</td><td>{found['points']}</td>"
        f"<td>{found['left_out']}</td>"
    )


def _overtime_table(overtime):
    rows = "".join(
        f"<tr><td>{TRAINING_NAMES[found['x']]}, and {TRAINING_NAMES[found['y']]}</td>{_cells(found)}</tr>"
        for found in overtime["correlations"]
    )
    return (
        f"<div class='scroll'><table><tr><th></th>{HEAD}</tr>{rows}</table></div>"
        "<p class='note'>Points of one run follow one another and are not independent: the p-values and intervals are "
        "too sure of themselves.</p>"
    )


# ---- figures ---------------------------------------------------------------------------------------------------------


def _styles(variants):
    """{name: line style}: the colour is the variant's, or one of its own; dash and marker tell models of one colour."""
    styles, used = {}, {}
    for n, (name, variant) in enumerate(variants.items()):
        again = used[variant] = used.get(variant, -1) + 1
        if variant in STYLES and not again:
            styles[name] = STYLES[variant]
            continue
        colour = STYLES[variant]["color"] if variant in STYLES else COLOURS[n % len(COLOURS)]
        dash = DASHES[(again if variant in STYLES else n // len(COLOURS)) % len(DASHES)]
        styles[name] = {"color": colour, "linestyle": dash, "marker": MARKERS[n % len(MARKERS)]}
    return styles


def _label(name):
    """A name as matplotlib shows it: no formula, and not hidden as what starts with an underscore is."""
    return " " + name.replace("$", r"\$")


def _figure(figure, caption):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    data = base64.b64encode(picture.getvalue()).decode()
    picture = f'<img alt="{html.escape(html.unescape(caption))}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _layers(results, styles):
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    names = ("gtd", "cross_layer_gtd", "entropy", "indirect_entropy")
    for axes, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        for result in results:
            values = [row[name] for row in result["layers"]]
            axes.plot(
                range(1, len(values) + 1), values, label=_label(result["name"]), markersize=5, **styles[result["name"]]
            )
        if name == "gtd":
            same = idempotent_gtd(results[0]["beta"], math.inf if results[0]["hops"] is None else results[0]["hops"])
            axes.axhline(same, color="grey", linewidth=0.8, label="identity = uniform = collapse")
            axes.legend(handles=axes.lines[-1:], fontsize=8)
        widen(axes, 0.02 if "gtd" in name else 0.2)
        axes.set(xlabel="layer", ylabel=COLUMNS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _regimes(results):
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(2.5 * columns + 1.8, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    for axes, result in zip(panels.flat, results, strict=False):
        layers = range(1, len(result["layers"]) + 1)
        bottom = np.zeros(len(layers))
        for kind in REGIMES:
            counts = np.array([row["regimes"][kind] for row in result["layers"]])
            axes.bar(layers, counts, bottom=bottom, label=kind, color=GREYS[kind], hatch=HATCHES[kind],
                     edgecolor="black", linewidth=0.6)  # fmt: skip
            bottom += counts
        axes.set_xlabel("layer")
        axes.set_title(_label(result["name"]), fontsize=9)
        axes.set_xticks(layers[:: max(1, len(layers) // 8)])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0, 0].set_ylabel("heads")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _positions(results, styles):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, which, title in zip(figure.subplots(1, 2), (0, -1), ("first layer", "last layer"), strict=True):
        for result in results:
            values = result["positional_entropy"][which]
            style = styles[result["name"]] | {"marker": ""}
            axes.plot(range(1, len(values) + 1), values, label=_label(result["name"]), **style)
        for causal in sorted({result["causal"] for result in results}):
            length = max(len(r["positional_entropy"][0]) for r in results if r["causal"] == causal)
            positions = np.arange(1, length + 1)
            most = np.log(positions) if causal else np.full(length, math.log(length))
            axes.plot(positions, most, color="grey", linewidth=0.7, linestyle=":" if causal else "-")
        axes.set(xlabel="position of the query", ylabel="entropy (nats)", title=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _last_layer(results, styles):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for result in results:
        layers = len(result["layers"])
        values = [head["entropy"] for head in result["heads"] if head["layer"] == layers]
        style = styles[result["name"]] | {"linestyle": ""}
        axes.plot(range(1, len(values) + 1), values, label=_label(result["name"]), **style)
    high = axes.get_ylim()[1]
    axes.set(
        xlabel="head of the last layer", ylabel="entropy (nats)", ylim=(0, 1.3 * high), xlim=(0.5, axes.get_xlim()[1])
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _maps(result, example):
    layers = len(example)
    columns = min(4, layers)
    rows = -(-layers // columns)
    figure = Figure(figsize=(2.7 * columns + 1, 2.9 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    brightest = float(example.max()) ** 0.5
    for axes, A, row in zip(panels.flat, example, result["layers"], strict=False):
        axes.set_visible(True)
        image = axes.imshow(A**0.5, cmap="Greys", vmin=0, vmax=brightest)
        axes.set_title(f"layer {row['layer']}, sparsity {row['sparsity']:.1%}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[0, 0].set(xlabel="key", ylabel="query")
    bar = figure.colorbar(image, ax=panels, shrink=0.8, label="attention")
    ticks = [f * brightest**2 for f in (0, 0.1, 0.5, 1)]
    bar.set_ticks([t**0.5 for t in ticks], labels=[f"{t:.2g}" for t in ticks])
    return figure


def _scatter(results, styles):
    """GTD against clustering and betweenness, each with its marginal histograms."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for panel, name in zip(figure.subfigures(1, 2), ("clustering_onnela", "betweenness_weighted"), strict=True):
        grid = panel.add_gridspec(2, 2, width_ratios=[4, 1], height_ratios=[1, 4])
        axes = panel.add_subplot(grid[1, 0])
        above, right = panel.add_subplot(grid[0, 0], sharex=axes), panel.add_subplot(grid[1, 1], sharey=axes)
        for result in results:
            points = [(p["gtd"], p[name]) for p in result["graphs"] if None not in (p["gtd"], p[name])]
            if not points:
                continue
            x, y = np.array(points).T
            style = styles[result["name"]]
            found = next(f for f in result["graph_correlations"] if f["y"] == name)
            r = "not defined" if found["r"] is None else f"{found['r']:.2f}, p = {found['p']:.1g}"
            axes.plot(x, y, marker=style["marker"], color=style["color"], linestyle="", markersize=4, alpha=0.6,
                      label=f"{_label(result['name'])}: r {'' if found['r'] is None else '= '}{r}")  # fmt: skip
            above.hist(x, bins=20, color=style["color"], alpha=0.5)
            right.hist(y, bins=20, color=style["color"], alpha=0.5, orientation="horizontal")
        axes.set(xlabel="GTD", ylabel=GRAPH_NAMES[name])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
        above.tick_params(labelbottom=False)
        right.tick_params(labelleft=False)
    return figure


def _overtime(overtime):
    figure = Figure(figsize=(11, 6), layout="constrained")
    points = overtime["points"]
    for row, x in zip(figure.subplots(2, 2), ("gtd", "cross_layer_gtd"), strict=True):
        for axes, y in zip(row, ("held_out_loss", "held_out_accuracy"), strict=True):
            kept = [p for p in points if p.get(y) is not None]
            steps = [p["step"] for p in kept]
            image = axes.scatter([p[x] for p in kept], [p[y] for p in kept], c=steps, cmap="viridis", edgecolor="black",
                                 linewidth=0.4)  # fmt: skip
            axes.set(xlabel=TRAINING_NAMES[x], ylabel=TRAINING_NAMES[y])
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.grid(alpha=0.3)
    figure.colorbar(image, ax=figure.axes, label="step", shrink=0.7)
    return figure
