# SPDX-License-Identifier: Apache-2.0
"""The pictures of `analyze_error.py`: samples side by side, and where in the image the error is."""

import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils.plots import STYLE

COLUMNS = 16  # samples in a line; more go below


def samples_figure(rows: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    """A row of pictures for every label, uint8 (B, H, W, C), column by column from the same noise; `COLUMNS` of them,
    and below the next ones."""
    count = len(next(iter(rows.values())))
    columns, blocks = min(count, COLUMNS), -(-count // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure, grid = _picture_grid(len(rows) * blocks, columns)
        for block in range(blocks):
            lines = grid[block * len(rows) : (block + 1) * len(rows)]
            for line, (label, images) in zip(lines, rows.items(), strict=True):
                images = images[block * columns : (block + 1) * columns]
                for axes, image in zip(line, images, strict=False):
                    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                for axes in line[len(images) :]:
                    axes.set_visible(False)
                _row_label(line, label)
        figure.savefig(path)


def error_maps_figure(maps: dict[str, np.ndarray], group_size: int, path: str | os.PathLike) -> None:
    """Where the error is at a few timesteps: one image, its error, its PLACE groups, and the error of all images.

    `maps`: timestep (T,); image and image_error (T, C, H, W); group_rank, of channel 0, and mean_error (T, H, W).
    """
    channels, last_rank = maps["image"].shape[1], int(maps["group_rank"].max())
    noised = "an image" if channels in (1, 3) else "channel 0"
    over, of = (" mean of channels,", "\nof channel 0") if channels > 1 else ("", "")
    rows = (  # label, pictures, colours
        (f"{noised},\nnoised", [_as_picture(image) for image in maps["image"]], "gray"),
        (f"its error,{over}\n$|e_T - e_S|$", maps["image_error"].mean(axis=1), "magma"),
        (f"its groups of {group_size}{of},\nby rank", maps["group_rank"], "cividis"),
        ("mean error\nof all images", maps["mean_error"], "magma"),
    )
    with matplotlib.rc_context(STYLE):
        figure, grid = _picture_grid(len(rows), len(maps["timestep"]), width=1.75, height=1.35)
        for line, (label, pictures, colours) in zip(grid, rows, strict=True):
            for axes, values in zip(line, pictures, strict=True):
                ranks, image = colours == "cividis", colours == "gray"
                highest = max(last_rank, 1) if ranks else (values.max() or 1)  # of an error of 0, all is dark
                drawn = axes.imshow(values, cmap=colours, vmin=0, vmax=highest, interpolation="nearest")
                bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
                bar.locator = matplotlib.ticker.MaxNLocator(3, integer=ranks)
                if ranks and last_rank == 0:
                    bar.set_ticks([0])
                bar.ax.tick_params(labelsize=8)
                bar.outline.set_visible(False)
                bar.ax.set_visible(not image and (not ranks or axes is line[-1]))
            _row_label(line, label)
        for axes, timestep in zip(grid[0], maps["timestep"], strict=True):
            axes.set_title(f"$t$ = {timestep}", loc="center")
        figure.savefig(path)


def _as_picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) -> what is shown, from 0 to 1: RGB (H, W, 3), or channel 0 (H, W)."""
    shown = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    return (shown - shown.min()) / (shown.max() - shown.min() or 1)


def _picture_grid(rows: int, columns: int, width: float = 1.05, height: float = 1.05) -> tuple[Figure, np.ndarray]:
    """Axes (rows, columns) of about `width` by `height` inches for pictures, without ticks, in thin pale frames that
    keep white ones apart."""
    figure = Figure(figsize=(1.5 + width * columns, 0.3 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, linewidth=0.5, color="#CCCCCC")
    return figure, grid


def _row_label(line: np.ndarray, label: str) -> None:
    line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
