# SPDX-License-Identifier: Apache-2.0
"""The pictures of `analyze_error.py`: samples side by side, and where in the image the error is."""

import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils.plots import STYLE


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
