"""Pictures, drawn without a screen. Lines differ in dash and marker, not only in colour."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import write_whole
from .metrics import idempotent_gtd

STYLES = {
    "original": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "high": {"color": "#d1495b", "linestyle": "--", "marker": "s"},
    "low": {"color": "#2e6f9e", "linestyle": ":", "marker": "^"},
    "elemmul": {"color": "#66812d", "linestyle": "-.", "marker": "D"},
    "none": {"color": "#8a8a8a", "linestyle": (0, (1, 2)), "marker": "x"},
    "uniform": {"color": "#c08a00", "linestyle": (0, (6, 2)), "marker": "v"},
    "fixed": {"color": "#7a4fa3", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
    "static": {"color": "#00857c", "linestyle": (0, (8, 2, 2, 2)), "marker": "X"},
    "linear": {"color": "#a0522d", "linestyle": (0, (2, 2)), "marker": "*"},
}
MEASURES = {"entropy": "attention entropy (nats)", "gtd": "GTD", "indirect_entropy": "indirect entropy (nats)"}


def attention_figure(results, maps, path):
    """Per-layer curves of every variant (in the manner of Fig. 4) above one attention map each (Fig. 6), as a PNG."""
    variants, uniform = results["variants"], results["corpus"]["uniform_entropy"]
    figure = Figure(figsize=(12, 7.2), layout="constrained", dpi=120)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    for axes, (measure, label) in zip(above.subplots(1, 3), MEASURES.items(), strict=True):
        reference, name = (
            (idempotent_gtd(), "identity = uniform = collapse") if measure == "gtd" else (uniform, "uniform")
        )
        axes.axhline(reference, color="grey", linewidth=0.8, label=name)
        lines = [
            axes.plot(range(1, len(row[measure]) + 1), row[measure], label=variant, markersize=5, **STYLES[variant])[0]
            for variant, row in variants.items()
        ]
        axes.legend(handles=axes.lines[:1], fontsize=8)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        widen(axes, 0.02 if measure == "gtd" else 0.2)
    above.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    above.suptitle("Held-out text, mean over heads and sequences")

    brightest = max(float(A.max()) for A in maps.values())
    panels = below.subplots(1, len(maps), squeeze=False)[0]
    for axes, (variant, A) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(A**0.5, cmap="Greys", vmin=0, vmax=brightest**0.5)
        axes.set_title(variant)
        axes.set_xlabel("token attended to")
    panels[0].set_ylabel("token that attends")
    bar = below.colorbar(image, ax=panels, shrink=0.8, label="attention (square-root scale)")
    ticks = [f * brightest for f in (0, 0.05, 0.25, 0.5, 1)]
    bar.set_ticks([t**0.5 for t in ticks], labels=[f"{t:.2g}" for t in ticks])
    below.suptitle("One held-out sequence, last layer, mean over heads")
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def widen(axes, least):
    """Let the vertical axis span that much: one so fine that noise looks like a trend would mislead."""
    low, high = axes.get_ylim()
    spare = max(0, least - (high - low)) / 2
    axes.set_ylim(low - spare, high + spare)
