# SPDX-License-Identifier: Apache-2.0
"""The charts and pictures of `analyze_error.py`, made from what it writes in `analysis.json` and `error_maps.npz`.

Colours are Okabe and Ito's, which stay apart for colour-blind readers. Figures are made without pyplot, so nothing
global is touched and no display is needed.
"""

import os
import textwrap

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter, StrMethodFormatter

COARSE, FINE, TOTAL, GREY = "#E69F00", "#56B4E9", "#222222", "#777777"
CHANNELS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # as many as can be told apart in one chart
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
MANY = 40  # places of the schedule beyond which markers would hide the lines
LETTERS_PER_INCH, LONGEST_WORD = 9.5, 12  # of a takeaway


def coarse_fine_figure(analysis: dict, path: str | os.PathLike, takeaway: str = "") -> None:
    """Size and share of the coarse and the fine part along the schedule, and their size by PLACE group; above them
    all, as in every figure, its `takeaway`."""
    rows, places, protocol = analysis["places"], [row["place"] for row in analysis["places"]], analysis["protocol"]
    last, group_size = protocol["num_places"], protocol["group_size"]
    thin = len(rows) > MANY

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.1), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        size, share, group = panels = figure.subplots(1, 3)

        # the total wide and pale below: it lies on the fine part wherever that is nearly all
        widths = {"total": 6, "fine": 1 if thin else 2, "coarse": 1 if thin else 2}
        markers = {"total": "_" if len(rows) == 1 else "", "fine": "" if thin else "o", "coarse": "" if thin else "s"}
        for name, color in (("total", "#C8C8C8"), ("fine", FINE), ("coarse", COARSE)):
            values = np.array([row[name] for row in rows])
            values = np.where(values > 0, values, np.nan)  # a logarithm has no place for none
            size.plot(
                places,
                values,
                marker=markers[name],
                color=color,
                linewidth=widths[name],
                markersize=24 if name == "total" else 4,
                markeredgewidth=5 if name == "total" else None,
                label=name,
            )
        if any(row["total"] > 0 for row in rows):
            size.set_yscale("log")
        size.set(
            title="(a) squared error,\nfitted per image and channel",
            xlabel=_axis(protocol),
            ylabel="mean of $(e_T - e_S)^2$",
            xlim=(0, last),
        )

        edges = np.linspace(0, last, len(rows) + 1)  # of the stretches of the schedule for which places stand
        by_channel, by_group = (
            np.array([part["coarse_share"] for part in parts], dtype=float)  # None, a share of no error, becomes nan
            for parts in (rows, [row["groups"] for row in rows])
        )
        place_width = 0.8 if thin else 1.8
        share.stairs((by_channel >= 0).astype(float), edges, fill=True, color=FINE)
        share.stairs(np.nan_to_num(by_channel), edges, fill=True, color=COARSE)
        place_line = share.stairs(
            by_group, edges, baseline=None, color=TOTAL, linewidth=place_width, linestyle="-" if thin else "--"
        )
        share.set(
            title="(b) share of it",
            xlabel=_axis(protocol),
            ylabel="share of the squared error",
            xlim=(0, last),
            ylim=(0, 1),
        )
        share.yaxis.set_major_formatter(PercentFormatter(1))

        ranks = analysis["mean"]["groups"]["ranks"]
        edges = np.arange(len(ranks["total"]) + 1) - 0.5
        fine = group.stairs(ranks["total"], edges, fill=True, color=FINE)
        coarse = group.stairs(ranks["coarse"], edges, fill=True, color=COARSE)
        group.set(
            title=f"(c) squared error,\nfitted per group of {group_size}",
            xlabel="group rank (0: smallest errors)",
            ylabel=f"mean of $(e_T - e_S)^2$, all {protocol['place_name']}s",
            xlim=(edges[0], edges[-1]),
        )
        group.xaxis.get_major_locator().set_params(integer=True)
        if len(edges) == 2:
            group.set_xticks([0])

        if analysis["mean"]["total"] == 0:
            for axes in panels:
                axes.text(0.5, 0.5, "no error", transform=axes.transAxes, ha="center", color=GREY)
        figure.legend(
            [coarse, fine, size.lines[0], place_line],
            ["coarse: removed by the fit", "fine: left", "total", f"coarse, fitted per group of {group_size}"],
            loc="outside lower center",
            ncols=4,
        )
        _say(figure, takeaway)
        figure.savefig(path)


def line_figure(analysis: dict, path: str | os.PathLike, takeaway: str = "") -> None:
    """Slope and intercept along the schedule: median and quartiles over images, of each of up to four channels."""
    rows, places, protocol = analysis["places"], [row["place"] for row in analysis["places"]], analysis["protocol"]
    channels = len(rows[0]["channels"])
    if 1 < channels <= len(CHANNELS):
        curves = [[row["channels"][c] for row in rows] for c in range(channels)]
        labels, band = [f"channel {c}: median" for c in range(channels)], "quartiles of images"
    else:
        curves, labels = [rows], ["median"]
        band = "quartiles of images" + " and channels" * (channels > 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        for axes, name, symbol, perfect in zip(
            figure.subplots(1, 2), ("slope", "intercept"), ("b_1", "b_0"), (1, 0), strict=True
        ):
            axes.axhline(perfect, color=GREY, linestyle="--", linewidth=1, label="perfect student")
            for c, (curve, label) in enumerate(zip(curves, labels, strict=True)):
                spreads = [entry[name] for entry in curve]
                _draw_spread(axes, places, spreads, label, band if c == 0 else None, CHANNELS[c])
            axes.set(
                xlabel=_axis(protocol),
                ylabel=f"{name} ${symbol}$" + ", in units\nof the prediction" * (name == "intercept"),
                xlim=(0, protocol["num_places"]),
            )
            axes.ticklabel_format(axis="y", useOffset=False)
        # below the axes, where it hides nothing
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
        _say(figure, takeaway)
        figure.savefig(path)


def _axis(protocol: dict) -> str:
    return f"{protocol['place_name']} (larger is noisier)"


def _draw_spread(axes, places: list[int], spreads: list[dict], label: str, band: str | None, color: str) -> None:
    """Median and quartiles by place; of a single one, a point and a bar, as a band would have no width."""
    lower, middle, upper = np.array([[spread[key] for spread in spreads] for key in ("q25", "median", "q75")])
    if len(places) == 1:
        bars = [middle - lower, upper - middle]
        axes.errorbar(places, middle, yerr=bars, fmt="none", ecolor=color, elinewidth=6, alpha=0.25, label=band)
    else:
        axes.fill_between(places, lower, upper, color=color, alpha=0.25, linewidth=0, label=band)
    thin = len(places) > MANY
    axes.plot(places, middle, "-" if thin else "o-", color=color, linewidth=1 if thin else 1.5, ms=4, label=label)


def error_maps_figure(
    maps: dict[str, np.ndarray], protocol: dict, path: str | os.PathLike, takeaway: str = ""
) -> None:
    """Where the error is at a few places of the schedule: one image, its error, its PLACE groups, and the error of all
    images. The errors have one scale, so that places compare.

    `maps`: place (T,); image and image_error (T, C, H, W); group_rank, of channel 0, and mean_error (T, H, W).
    """
    channels, last_rank = maps["image"].shape[1], int(maps["group_rank"].max())
    noised = "an image" if channels in (1, 3) else "channel 0"
    over, of = (" mean of channels,", "\nof channel 0") if channels > 1 else ("", "")
    image_error = maps["image_error"].mean(axis=1)
    errors, ranks = _error_scale(image_error, maps["mean_error"]), Normalize(0, max(last_rank, 1))
    rows = (  # label, pictures, colours, their scale, what it is of
        (f"{noised},\nnoised", [_as_picture(image) for image in maps["image"]], "gray", Normalize(0, 1), ""),
        (f"its error,{over}\n$|e_T - e_S|$", image_error, "magma", errors, "error"),
        (f"its groups of {protocol['group_size']}{of},\nby rank", maps["group_rank"], "cividis", ranks, "rank"),
        ("mean error\nof all images", maps["mean_error"], "magma", errors, "error"),
    )
    with matplotlib.rc_context(STYLE):
        figure, grid = _picture_grid(len(rows), len(maps["place"]))
        for line, (label, pictures, colours, scale, what) in zip(grid, rows, strict=True):
            colours = matplotlib.colormaps[colours].with_extremes(bad="black")  # no error, on a logarithm
            for axes, values in zip(line, pictures, strict=True):
                drawn = axes.imshow(values, cmap=colours, norm=scale, interpolation="nearest")
            bar = figure.colorbar(drawn, ax=list(line), fraction=0.05, pad=0.01, aspect=10, label=what)
            if isinstance(scale, LogNorm):  # whose own labels of less than a decade run into each other
                bar.locator, bar.formatter = LogLocator(subs=(1.0, 3.0), numticks=6), StrMethodFormatter("{x:g}")
                bar.minorticks_off()
                bar.update_ticks()
            if what == "rank":
                bar.set_ticks(np.unique(np.linspace(0, last_rank, 4).round()))
            bar.ax.tick_params(labelsize=9)
            bar.outline.set_visible(False)
            bar.ax.set_visible(bool(what))
            _row_label(line, label)
        for axes, place in zip(grid[0], maps["place"], strict=True):
            axes.set_title(f"{protocol['place_name']} {place}", loc="center")
        _say(figure, takeaway)
        figure.savefig(path)


def _error_scale(*errors: np.ndarray) -> Normalize:
    """One for all of them: a logarithm, as errors of different timesteps differ by orders of magnitude, over three at
    the most; of no error at all, all is dark."""
    values = np.concatenate([error[error > 0] for error in errors])
    if not len(values):
        return Normalize(0, 1)
    lowest = errors[-1][errors[-1] > 0].min(initial=values.max())  # of the means; single errors come near 0 by chance
    return LogNorm(max(min(lowest, values.max() / 10), values.max() / 1000), values.max(), clip=True)


def _as_picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) -> what is shown, from 0 to 1: RGB (H, W, 3), or channel 0 (H, W)."""
    shown = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    return (shown - shown.min()) / (shown.max() - shown.min() or 1)


def _picture_grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Axes (rows, columns) for pictures, without ticks, in thin pale frames that keep white ones apart."""
    figure = Figure(figsize=(1.5 + 1.75 * columns, 0.3 + 1.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, linewidth=0.5, color="#CCCCCC")
    return figure, grid


def _row_label(line: np.ndarray, label: str) -> None:
    line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)


def _say(figure: Figure, takeaway: str) -> None:
    """The takeaway above a figure, in lines of about one length that are no wider than it is."""
    if takeaway:
        letters = max(48, int(figure.get_figwidth() * LETTERS_PER_INCH))
        lines = -(-len(takeaway) // letters)
        text = textwrap.fill(takeaway, min(letters, len(takeaway) // lines + LONGEST_WORD))
        figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
