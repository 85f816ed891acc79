# SPDX-License-Identifier: Apache-2.0
"""The charts of `analyze_error.py`, made from what it writes in `analysis.json`.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; widths fit a two-column page. Figures are made
without pyplot, so nothing global is touched and no display is needed.
"""

import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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
