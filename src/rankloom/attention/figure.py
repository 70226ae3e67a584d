"""The picture of a probe: the verdict of every head, and how far each is from the threshold."""

from __future__ import annotations

from pathlib import Path

from rankloom.attention.report import VERDICTS, Report, Verdict, threshold

__all__ = ["draw"]

# Okabe and Ito's colours, told apart by every common kind of colour vision.
_COLOUR: dict[Verdict, str] = {"polynomial": "#009E73", "low-rank": "#0072B2", "exact": "#C9C9C9"}
_MARKER: dict[Verdict, str] = {"polynomial": "o", "low-rank": "s", "exact": "x"}


def draw(report: Report, path: str | Path) -> None:
    """Write a figure of ``report`` to ``path`` (its suffix says which format): a layer x head map for each length, coloured
    by verdict, and every head's largest entry and logit standard deviation against ``sqrt(log L)``.

    Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = 1 + max(head.layer for head in report.heads)
    width = 1 + max(head.head for head in report.heads)
    count = len(report.lengths)
    figure = Figure(figsize=(2.6 * count + 5.2, max(3.6, 1.6 + 0.13 * layers)), layout="constrained")
    FigureCanvasAgg(figure)
    *maps, scatter = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.8], squeeze=False)[0]
    colours = ListedColormap([_COLOUR[verdict] for verdict in VERDICTS])
    for axes, length in zip(maps, report.lengths, strict=True):
        cells = [[float("nan")] * width for _ in range(layers)]
        for head in report.heads:
            cells[head.layer][head.head] = VERDICTS.index(head.verdicts[length])
        axes.imshow(
            cells, cmap=colours, norm=BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3), aspect="auto", interpolation="none"
        )
        axes.set(title=f"{length:,} tokens" + (" *" if length > report.tokens else ""), xlabel="head", ylabel="layer")
        axes.locator_params(integer=True)
    longest = max(report.lengths)
    for verdict in VERDICTS:
        heads = [head for head in report.heads if head.verdicts[longest] == verdict]
        scatter.scatter(
            [head.logit_std for head in heads],
            [head.bound for head in heads],
            c=_COLOUR[verdict] if verdict != "exact" else "#6E6E6E",
            marker=_MARKER[verdict],
            s=16,
        )
    for length, style in zip(report.lengths, ("-", "--", ":", "-.") * count, strict=False):
        scatter.axhline(threshold(length), color="#D55E00", linestyle=style, linewidth=1, label=f"sqrt(log {length:,})")
    scatter.set(xscale="log", yscale="log", xlabel="standard deviation of the centred logits", ylabel="largest entry B")
    scatter.set_title(f"verdict at {longest:,} tokens")
    scatter.legend(frameon=False, fontsize=8)
    figure.legend(
        handles=[Patch(color=_COLOUR[verdict], label=verdict) for verdict in VERDICTS],
        loc="outside lower center",
        ncols=len(VERDICTS),
        frameon=False,
    )
    starred = f"   (* longer than the {report.tokens:,} tokens probed)" if longest > report.tokens else ""
    figure.suptitle(f"{report.model}: {len(report.heads)} heads, error {report.eps:g}{starred}", fontsize=11)
    figure.savefig(path)
