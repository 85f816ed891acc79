# SPDX-License-Identifier: Apache-2.0
"""The curves of a run as a picture."""

import json
from pathlib import Path
from typing import NamedTuple


class Panel(NamedTuple):
    """`curves`: name in `log.jsonl` -> what it is called; `level`: where a grey line is drawn, to compare with;
    `level_name`: what the legend calls that."""

    title: str
    unit: str  # of the y axis
    curves: dict[str, str]
    log: bool = True
    level: float | None = None
    level_name: str = "_"  # in no legend
    from_zero: bool = False


QUARTERS = ("cleanest quarter", "second", "third", "noisiest")
PANELS = (
    Panel(
        "loss terms",
        "mean since the last log",
        {"loss": "loss (weighted sum)"}
        | {name: name for name in ("task", "variance", "output", "coarse", "fine", "output_variance", "feature")},
    ),
    Panel(
        "error along the schedule",
        "mean squared error",
        {f"error_quarter_{i}": label for i, label in enumerate(QUARTERS, 1)},
    ),
    Panel(
        "weight and line of the output loss",
        "w and slope: 1 is a perfect fit",
        {"w": "w, of the fine part", "slope": "slope, mean"},
        log=False,
        level=1.0,
    ),
    Panel(
        "distance of the samples",
        "Frechet distance to real images",
        {"frechet_distance": "student"},
        log=False,
        level_name="teacher",
        from_zero=True,
    ),
    Panel("learning rate", "learning rate", {"learning_rate": "learning rate"}, log=False, from_zero=True),
)
COLUMNS, FEW = 3, 20  # panels in a row; points of a curve up to which each is marked


def plot_losses(log: Path, picture: Path, teacher: float | None = None) -> None:
    """Draw `log.jsonl`: the loss terms, the student's error by quarter of the schedule, weight and slope of the
    line, the distance of its samples, the learning rate. Curves that are nowhere above 0, as `coarse` is in the
    conventional losses, panels without a curve, and weight and line where no line is fitted are left out. `teacher`:
    the distance of its samples."""
    import matplotlib  # here and not above: half a second that --help and a refused flag need not wait for
    from matplotlib.figure import Figure  # without pyplot nothing global is touched

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    drawn, has_lines = [], any(line.get("coarse") for line in lines)
    for panel in PANELS:
        if "slope" in panel.curves and not has_lines:
            continue
        points = {label: _points(lines, name, positive=panel.log) for name, label in panel.curves.items()}
        points = {label: found for label, found in points.items() if any(value > 0 for _, value in found)}
        if points:
            drawn.append((panel, points))
    columns = max(1, min(COLUMNS, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4 * columns, 3.9 * rows), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        last = max((line["step"] for line in lines), default=1)
        for axes, (panel, points) in zip(grid, drawn, strict=False):
            level = teacher if "frechet_distance" in panel.curves else panel.level
            if level is not None:
                axes.axhline(level, color="#999999", linewidth=0.8, linestyle="--", label=panel.level_name)
            for label, found in points.items():
                marker = "." if len(found) < FEW else ""
                axes.plot(*zip(*found, strict=True), marker=marker, linewidth=1.2, label=label)
            axes.set(
                title=panel.title, xlabel="optimizer step", ylabel=panel.unit, yscale="log" if panel.log else "linear"
            )
            axes.set_xlim(0, 1.03 * last)
            axes.xaxis.get_major_locator().set_params(integer=True)  # a short run has no half steps
            if panel.from_zero:
                highest = max(value for found in points.values() for _, value in found)
                axes.set_ylim(0, 1.08 * max(highest, level or 0))
            if len(axes.get_legend_handles_labels()[0]) > 1:  # below the axes, where it hides nothing
                axes.legend(
                    loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3 if len(points) > 4 else 2, fontsize=9
                )
        for axes in grid[len(drawn) :]:
            axes.set_visible(False)
        figure.savefig(picture, dpi=120)


def _points(lines: list[dict], name: str, *, positive: bool) -> list[tuple[int, float]]:
    """(step, value) of a name; a logarithm has no place for what is not positive."""
    known = ((line["step"], line[name]) for line in lines if line.get(name) is not None)
    return [(step, value) for step, value in known if value > 0 or not positive]
