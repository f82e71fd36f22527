"""Table 2, figure 4 and figure 5 as rows to print and pictures to look at.

All take what `measure_memory`, `measure_step` and `measure_layer` returned, in the order
of the jobs; what is missing, of a run that is not complete, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sylva_train.report import THEME

from .subjects import LABELS
from .timing import PHASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Table", "draw_fig4", "draw_fig5", "fig4", "fig5", "table2"]

Results = Sequence[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]

OUT_OF_MEMORY = "OOM"
#: The paper's: forward orange, backward purple, optimizer green.
PHASE_COLOURS = {
    phase: THEME[name][0]
    for phase, name in zip(PHASES, ("orange", "violet", "green"), strict=True)
}
METHOD_COLOURS = {
    method: THEME[name][0]
    for method, name in {
        "full": "coal",
        "zero": "coal",
        "frozen": "grey",
        "lora": "orange",
        "lora-compiled": "yellow",
        "sylva": "blue",
        "kfac-pruner": "red",
    }.items()
}


def unique(values: Any) -> list[Any]:
    """Return different values in the order of their first."""
    return list(dict.fromkeys(values))


def milliseconds(seconds: dict[str, float]) -> str:
    """Print a median and its quartiles."""
    low, middle, high = (1e3 * seconds[name] for name in ("q1", "median", "q3"))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def table2(results: Results) -> Table:
    """Return table 2: peak memory in GB by model, budget and method.

    Returns
    -------
    header : list of str
    rows : list of list of str
        ``"OOM"`` where memory did not suffice, ``"-"`` where nothing was measured.
    """
    methods = unique(r["spec"]["method"] for r in results)
    cells = {}
    for r in results:
        spec, peak = r["spec"], r["peak_memory_bytes"]
        text = OUT_OF_MEMORY if r["out_of_memory"] else f"{peak / 1e9:.3g}"
        key = spec["model"], spec["rank"], spec["density"]
        cells[key, spec["method"]] = text
    header = ["model", "r / σ (%)", *(LABELS[method] for method in methods)]
    rows = [
        [
            key[0],
            f"{key[1] or 'equal'} / {100 * (1 - key[2]):g}",
            *(cells.get((key, method), "-") for method in methods),
        ]
        for key in unique(key for key, _ in cells)
    ]
    return header, rows


def fig4(results: Results) -> Table:
    """Return the numbers of figure 4: milliseconds of a step's parts, and tokens/s."""
    header = ["model", "processes", "method", *(f"{part} (ms)" for part in PHASES)]
    header += ["total (ms)", "tokens/s", "peak memory (GB)"]
    rows = []
    for r in results:
        spec = r["spec"]
        row = [spec["model"], str(spec["processes"]), r["label"]]
        if r["seconds"] is None:
            rows.append([*row, *[OUT_OF_MEMORY] * 6])
            continue
        row += [milliseconds(r["seconds"][part]) for part in (*PHASES, "total")]
        speed, peak = r["tokens_per_second"], r["peak_memory_bytes"]
        rows.append([*row, f"{speed:.4g}", f"{peak / 1e9:.3g}"])
    return header, rows


def fig5(results: Results) -> Table:
    """Return the numbers of figure 5: a layer's milliseconds, and relative to others."""
    header = ["out × in", "tokens", "method", *(f"{part} (ms)" for part in PHASES)]
    header += ["total (ms)", "over full", "over LoRA"]
    rows = []
    for r in results:
        spec = r["spec"]
        totals = {x["method"]: x["seconds"]["total"]["median"] for x in r["rows"]}
        for x in r["rows"]:
            own = totals[x["method"]]
            ratios = [
                f"{own / totals[other]:.2f}" if other in totals else "-"
                for other in ("full", "lora")
            ]
            times = [milliseconds(x["seconds"][part]) for part in (*PHASES, "total")]
            shape = f"{spec['out_features']} × {spec['in_features']}"
            tokens = str(spec["batch"] * spec["sequence"])
            rows.append([shape, tokens, x["label"], *times, *ratios])
    return header, rows


def frames(titles: Sequence[str], width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure, and its frames side by side of a size each, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(len(titles) * width, height), layout="constrained")
    row = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure, row


def draw_fig4(results: Results) -> Figure:
    """Draw figure 4: a step's forward, backward and optimizer, by number of processes.

    Parameters
    ----------
    results : sequence of dict
        Of `measure_step`.
    """
    from matplotlib.patches import Patch

    models = unique(r["spec"]["model"] for r in results)
    methods = unique(r["spec"]["method"] for r in results)
    figure, row = frames(models, 3.4, 3.0)
    for axes, model in zip(row, models, strict=True):
        own = [r for r in results if r["spec"]["model"] == model]
        groups = unique(r["spec"]["processes"] for r in own)
        ticks = []
        for r in own:
            method, n = r["spec"]["method"], r["spec"]["processes"]
            place = groups.index(n) * (len(methods) + 1) + methods.index(method)
            ticks.append((place, LABELS[method]))
            if r["seconds"] is None:
                axes.text(
                    place,
                    0,
                    OUT_OF_MEMORY,
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=7,
                )
                continue
            height = 0.0
            for part in PHASES:
                value = 1e3 * r["seconds"][part]["median"]
                axes.bar(place, value, bottom=height, color=PHASE_COLOURS[part])
                height += value
        axes.set_xticks(
            [place for place, _ in ticks], [label for _, label in ticks], rotation=90
        )
        for number, n in enumerate(groups):
            middle = number * (len(methods) + 1) + (len(methods) - 1) / 2
            text = f"{n} process{'es' if n > 1 else ''}"
            axes.annotate(
                text, (middle, 1), xycoords=("data", "axes fraction"), ha="center",
                va="top", fontsize=7,
            )  # fmt: skip
        axes.margins(y=0.12)
    row[0].set_ylabel("ms a step")
    handles = [Patch(color=PHASE_COLOURS[part], label=part) for part in PHASES]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def draw_fig5(results: Results) -> Figure:
    """Draw figure 5: a layer's latency by its size, a frame for each number of tokens.

    The bands are quartiles.

    Parameters
    ----------
    results : sequence of dict
        Of `measure_layer`.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    def tokens(r: dict[str, Any]) -> int:
        return int(r["spec"]["batch"] * r["spec"]["sequence"])

    lengths = unique(map(tokens, results))
    methods = unique(x["method"] for r in results for x in r["rows"])
    figure, row = frames([f"{length} tokens" for length in lengths], 2.6, 2.8)
    for axes, length in zip(row, lengths, strict=True):
        own = [r for r in results if tokens(r) == length]
        shapes = [
            f"{r['spec']['out_features']}\n× {r['spec']['in_features']}" for r in own
        ]
        for method in methods:
            found = [
                (place, x["seconds"]["total"])
                for place, r in enumerate(own)
                for x in r["rows"]
                if x["method"] == method
            ]
            places = [place for place, _ in found]
            low, middle, high = (
                [1e3 * seconds[name] for _, seconds in found]
                for name in ("q1", "median", "q3")
            )
            colour = METHOD_COLOURS[method]
            axes.plot(places, middle, "o-", ms=3.5, color=colour, label=LABELS[method])
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(own)), shapes)
        axes.set_xlabel("out × in")
    row[0].set_ylabel("ms: forward, backward, optimizer")
    handles, names = row[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)
    return figure
