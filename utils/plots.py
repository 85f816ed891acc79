# SPDX-License-Identifier: Apache-2.0
"""The figures and the table of `analyze_error.py`, made from what it writes: `analysis.json`, maps and samples.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; widths fit a two-column page. Figures are made
without pyplot, so nothing global is touched and no display is needed.
"""

import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

FIGURES = ("coarse_fine.png", "line.png", "samples.png", "error_maps.png")

COARSE, FINE, TOTAL, BLUE, GREY = "#E69F00", "#56B4E9", "#222222", "#0072B2", "#777777"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}
TIMESTEP = "timestep $t$ (larger is noisier)"


def save_figures(analysis: dict, maps: dict, samples: dict[str, np.ndarray], folder: Path) -> None:
    """All of `FIGURES`: `analysis` as in analysis.json, `maps` as in error_maps.npz, `samples` as `samples_figure`."""
    distances = analysis["samples"].get("frechet_distance", {})
    rows = {who + (f"\nFrechet {distances[who]:.2f}" if distances else ""): images for who, images in samples.items()}
    coarse_fine_figure(analysis, folder / FIGURES[0])
    line_figure(analysis, folder / FIGURES[1])
    samples_figure(rows, folder / FIGURES[2])
    error_maps_figure(maps, analysis["protocol"]["group_size"], folder / FIGURES[3])


def coarse_fine_figure(analysis: dict, path: str | os.PathLike) -> None:
    """Size and share of the coarse and the fine part by timestep, and their size by PLACE group."""
    rows, timesteps = analysis["timesteps"], [row["timestep"] for row in analysis["timesteps"]]
    last, group_size = analysis["protocol"]["num_train_timesteps"], analysis["protocol"]["group_size"]
    stretch = last / len(rows)  # of the schedule, for which a timestep stands
    # None, the share of no error at all, becomes nan, which is not drawn
    by_channel = np.array([row["coarse_share"] for row in rows], dtype=float)
    by_group = np.array([row["place"]["coarse_share"] for row in rows], dtype=float)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.9), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        size, share, group = figure.subplots(1, 3)

        for name, marker, color in (("total", "", TOTAL), ("fine", "o", FINE), ("coarse", "s", COARSE)):
            values = np.array([row[name] for row in rows])
            values = np.where(values > 0, values, np.nan)  # a logarithm has no place for none
            size.plot(timesteps, values, marker=marker, color=color, linewidth=2, markersize=4, label=name)
        if any(row["total"] > 0 for row in rows):
            size.set_yscale("log")
        size.set(
            title="(a) size, a line per channel", xlabel=TIMESTEP, ylabel="mean of $(e_T - e_S)^2$", xlim=(0, last)
        )

        share.bar(timesteps, 1 - by_channel, bottom=by_channel, width=stretch, color=FINE)
        coarse = share.bar(timesteps, by_channel, width=stretch, color=COARSE)
        edges = np.linspace(0, last, len(rows) + 1)
        place_line = share.stairs(by_group, edges, baseline=None, color=TOTAL, linewidth=1.8, linestyle="--")
        share.set(
            title="(b) share, a line per channel",
            xlabel=TIMESTEP,
            ylabel="share of the squared error",
            xlim=(0, last),
            ylim=(0, 1),
        )
        share.yaxis.set_major_formatter(PercentFormatter(1))

        ranks = analysis["mean"]["place"]["ranks"]
        place = np.arange(len(ranks["total"]))
        fine = group.bar(place, ranks["fine"], bottom=ranks["coarse"], width=1, color=FINE)
        group.bar(place, ranks["coarse"], width=1, color=COARSE)
        group.set(
            title=f"(c) size, a line per group of {group_size}",
            xlabel="group rank (0: smallest errors)",
            ylabel="mean of $(e_T - e_S)^2$, all $t$",
            xlim=(-0.5, len(place) - 0.5),
        )
        group.xaxis.get_major_locator().set_params(integer=True)

        figure.legend(
            [coarse, fine, size.lines[0], place_line],
            ["coarse: removed by the line", "fine: left", "total", f"coarse with a line per group of {group_size}"],
            loc="outside lower center",
            ncols=4,
        )
        figure.savefig(path)


def line_figure(analysis: dict, path: str | os.PathLike) -> None:
    """Slope and intercept by timestep: median and quartiles over the lines."""
    rows, timesteps = analysis["timesteps"], [row["timestep"] for row in analysis["timesteps"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        for axes, name, symbol, perfect in zip(
            figure.subplots(1, 2), ("slope", "intercept"), ("b_1", "b_0"), (1, 0), strict=True
        ):
            lower, middle, upper = ([row[name][key] for row in rows] for key in ("q25", "median", "q75"))
            axes.axhline(perfect, color=GREY, linestyle="--", linewidth=1, label="perfect student")
            axes.fill_between(
                timesteps, lower, upper, color=BLUE, alpha=0.25, linewidth=0, label="quartiles of images"
            )
            axes.plot(timesteps, middle, "o-", color=BLUE, markersize=4, label="median")
            axes.set(
                xlabel=TIMESTEP,
                ylabel=f"{name} ${symbol}$" + " (units of the prediction)" * (name == "intercept"),
                xlim=(0, analysis["protocol"]["num_train_timesteps"]),
            )
        axes.legend(fontsize=10)
        figure.savefig(path)


def samples_figure(rows: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    """A row of pictures for every label: uint8 (B, H, W, C), column by column from the same noise."""
    count = len(next(iter(rows.values())))
    with matplotlib.rc_context(STYLE):
        figure, grid = _picture_grid(len(rows), count)
        for line, (label, images) in zip(grid, rows.items(), strict=True):
            for axes, image in zip(line, images, strict=True):
                axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            _row_label(line, label)
        figure.savefig(path)


def error_maps_figure(maps: dict[str, np.ndarray], group_size: int, path: str | os.PathLike) -> None:
    """Where the error is at a few timesteps: one image, its error, its PLACE groups, and the error of all images.

    `maps`: timestep (T,), and image, image_error, group_rank and mean_error (T, H, W).
    """
    last_rank = int(maps["group_rank"].max())
    rows = (  # key, label, colours, range; None is each picture's own
        ("image", "an image,\nnoised", "gray", None),
        ("image_error", "its error\n$|e_T - e_S|$", "magma", None),
        ("group_rank", f"its groups of {group_size},\nby rank", "cividis", (0, max(last_rank, 1))),
        ("mean_error", "mean error\nof all images", "magma", None),
    )
    with matplotlib.rc_context(STYLE):
        figure, grid = _picture_grid(len(rows), len(maps["timestep"]), width=1.75, height=1.35)
        for line, (key, label, colours, limits) in zip(grid, rows, strict=True):
            for column, (axes, values) in enumerate(zip(line, maps[key], strict=True), start=1):
                lowest, highest = limits or ((0 if key != "image" else values.min()), values.max())
                picture = axes.imshow(values, cmap=colours, vmin=lowest, vmax=highest, interpolation="nearest")
                bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
                bar.locator = matplotlib.ticker.MaxNLocator(3, integer=limits is not None)
                bar.ax.tick_params(labelsize=8)
                bar.outline.set_visible(False)
                bar.ax.set_visible(key.endswith("error") or (key == "group_rank" and column == len(line)))
            _row_label(line, label)
        for axes, timestep in zip(grid[0], maps["timestep"], strict=True):
            axes.set_title(f"$t$ = {timestep}", loc="center")
        figure.savefig(path)


def error_table(analysis: dict) -> str:
    """The split by timestep, and what correcting it brings."""

    def line(name, row: dict) -> str:
        parts = "".join(f"{row[part]:11.3e}" if part in row else " " * 11 for part in ("total", "coarse", "fine"))
        shares = [part["coarse_share"] for part in (row, row["place"])]
        shares = "".join("        -" if value is None else f"{value:9.1%}" for value in shares)
        medians = "".join(f"{row[key]['median']:11.4f}" for key in ("slope", "intercept") if key in row)
        return f"{name:>8}{parts}{shares}{medians}"

    samples = analysis["samples"]
    distances = samples.get("frechet_distance", {})
    group = f"{analysis['protocol']['group_size']} each"
    lines = [
        f"{'':8}{'mean squared error':^33}{'coarse share, line':>19}{'median over lines':>21}",
        f"{'timestep':>8}{'total':>11}{'coarse':>11}{'fine':>11}{'channel':>9}{group:>9}{'slope':>11}{'intercept':>11}",
        *(line(row["timestep"], row) for row in analysis["timesteps"]),
        line("mean", analysis["mean"]),
        line("chance", analysis["chance"]),
        "",
        f"{samples['num_samples']:,} samples each, from the same noise",
        f"{'':12}{'pixels from the teacher (of 255)':>36}" + ("Frechet distance".rjust(20) if distances else ""),
    ]
    for who, gap in samples["pixel_difference_to_teacher"].items():
        lines.append(f"{who:<12}{gap:36.2f}" + (f"{distances[who]:20.2f}" if distances else ""))
    if samples.get("warning"):
        lines.append(samples["warning"])
    return "\n".join(lines)


def _picture_grid(rows: int, columns: int, width: float = 1.05, height: float = 1.05) -> tuple[Figure, np.ndarray]:
    """Axes (rows, columns) of about `width` by `height` inches for pictures, without ticks or frames."""
    figure = Figure(figsize=(1.5 + width * columns, 0.3 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure, grid


def _row_label(line: np.ndarray, label: str) -> None:
    line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
