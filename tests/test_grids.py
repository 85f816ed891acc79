# SPDX-License-Identifier: Apache-2.0
"""Grids of samples: pixel for pixel, in order, and labelled with what can be written; the curves of a run."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from utils.grids import _font, image_grid, wrapped, writable
from utils.publishing.curves import plot_losses


def pictures(count: int, channels: int, side: int, seed: int = 0) -> torch.Tensor:
    shape = (count, channels, side, side)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def places(grid: Image.Image, image: torch.Tensor, scale: int) -> list[tuple[int, int]]:
    """Where (row, column of a pixel) an image stands in a grid, every pixel of it `scale` wide and high."""
    tile = np.asarray(image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)).squeeze()
    canvas = np.asarray(grid)
    windows = np.lib.stride_tricks.sliding_window_view(canvas, tile.shape)
    windows = windows.reshape(*windows.shape[:2], *tile.shape)
    alike = np.argwhere((windows[:, :, 0, 0] == tile[0, 0]).reshape(*windows.shape[:2], -1).all(-1))
    return [(y, x) for y, x in alike.tolist() if np.array_equal(windows[y, x], tile)]


@pytest.mark.parametrize("count, channels, side, scale", [(1, 1, 8, 8), (10, 3, 16, 4), (17, 1, 8, 8), (3, 3, 80, 1)])
def test_every_picture_is_there_pixel_for_pixel_and_in_order(count, channels, side, scale):
    rows = {"teacher": pictures(count, channels, side), "student": pictures(count, channels, side, seed=1)}
    grid = image_grid(rows, columns=[f"{i} of {count}" for i in range(count)], title="step 3 of 4")
    found = {who: [places(grid, image, scale) for image in images] for who, images in rows.items()}
    assert all(len(where) == 1 for who in found for where in found[who])
    above, below = ([where[0] for where in found[who]] for who in rows)
    assert all(y1 < y2 and x1 == x2 for (y1, x1), (y2, x2) in zip(above, below, strict=True))
    assert above == sorted(above) and above[0][1] > 40  # line by line; the row's label has room
    assert len({y for y, _ in above}) == -(-count // 8)


def test_rows_of_two_sizes_come_to_the_larger():
    large, small = pictures(2, 3, 64), pictures(2, 1, 32, seed=1)
    grid = image_grid({"a": large, "b": small})
    assert places(grid, large[1], 1) and places(grid, small.expand(-1, 3, -1, -1)[1], 2)
    assert image_grid({"a": large, "b": pictures(2, 3, 48)}).width == grid.width


def test_labels_are_written():
    rows, words = {"teacher": torch.full((2, 1, 64, 64), 255, dtype=torch.uint8)}, ["a cat", "a dog"]
    plain = image_grid({"": rows["teacher"]})
    assert np.asarray(plain).min() == 255
    for more in ({}, {"columns": words}, {"title": "step 1"}):
        labelled = np.asarray(image_grid(rows if not more else {"": rows["teacher"]}, **more))
        assert labelled.min() < 128 and labelled.size > np.asarray(plain).size, more
    other = image_grid({"": rows["teacher"]}, columns=["a cat", "a dot"])
    assert np.asarray(other).tolist() != np.asarray(image_grid({"": rows["teacher"]}, columns=words)).tolist()


def test_what_the_font_cannot_write_gets_a_number():
    texts = [
        "na\u00efve caf\u00e9",
        "\u043a\u043e\u0448\u043a\u0430",
        "\u732b",
        "\u0642\u0637\u0629",
        "two\n lines",
        "",
        "\u05d7",
    ]
    assert writable(texts) == [*texts[:2], "prompt 3", "prompt 4", "two lines", "", "prompt 7"]


@pytest.mark.parametrize("text", ["a", "word " * 40, "Donaudampfschifffahrtsgesellschaft" * 3, "", "one\ntwo"])
def test_long_labels_are_cut_to_their_room(text):
    lines = wrapped(text, 12, 64, lines=3)
    assert len(lines) <= 3
    image_grid({"a": pictures(1, 1, 8)}, columns=[text], title=text)
    assert all(_font(12).getlength(line) <= 64 for line in lines)
    assert ("\u2026" in "".join(lines)) == (len(text) > 20)
    if len(text) <= 20:
        assert "\n".join(lines) == text


@pytest.fixture
def figure(monkeypatch) -> list[Figure]:
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def written(axes) -> str:
    return "\n".join(text.get_text() for text in axes.findobj(Text))


LINE = {"loss": 2.0, "task": 1.0, "output": 1.0, "coarse": 0.5, "fine": 0.25, "w": 0.5, "slope": 0.75}
LINE |= {"learning_rate": 1e-3, **{f"error_quarter_{i}": i / 4 for i in range(1, 5)}}


def test_curves_say_what_they_are_and_hide_nothing(figure, tmp_path):
    lines = [{"step": step, **LINE} for step in (1, 2, 3)] + [{"step": 3, "frechet_distance": 12.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png", 1.5)
    (drawn,) = figure
    drawn.canvas.draw()
    panels = [axes for axes in drawn.axes if axes.get_visible()]
    assert len(panels) == 5 and all(
        axes.get_ylabel() and axes.get_xlabel() and axes.get_title("left") for axes in panels
    )
    shown = "\n".join(map(written, panels))
    for word in (
        "coarse",
        "fine",
        "cleanest quarter",
        "w, of the fine part",
        "slope",
        "Frechet distance",
        "learning rate",
    ):
        assert word in shown
    values = {line.get_label(): line.get_ydata()[-1] for axes in panels for line in axes.lines}
    assert (
        values["slope, mean"] == 0.75
        and values["student"] == 12.5
        and values["teacher"] == 1.5
        and values["learning rate"] == 1e-3
    )
    for axes in panels:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())  # steps, of a run of 3 too
        if axes.get_legend():
            assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_curves_that_are_not_there_are_left_out(figure, tmp_path):
    lines = [{"step": step, "loss": 1.0, "output": 0.0, "coarse": None, "learning_rate": 1e-3} for step in (1, 2)]
    for content, number in (("".join(json.dumps(line) + "\n" for line in lines), 2), ("", 0)):
        (tmp_path / "log.jsonl").write_text(content)
        plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png")
        assert sum(axes.get_visible() and bool(axes.lines) for axes in figure[-1].axes) == number
    assert "output" not in "\n".join(map(written, figure[0].axes))
