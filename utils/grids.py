# SPDX-License-Identifier: Apache-2.0
"""Pictures side by side, pixel for pixel, with words beside them: rows on the left, columns above, a title over all.

Written is with the font that matplotlib brings, so that a grid looks the same on every machine. What it cannot write
(it has no Chinese, and nothing here joins or turns letters) is replaced by a number: see `writable`.
"""

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.pixels import as_rgb

LEAST_TITLE = 36  # letters that a title may have in a line, however narrow the pictures
GREY = 110  # of row and column labels; the title is black


def image_grid(
    rows: Mapping[str, Tensor],
    *,
    columns: Sequence[str] = (),
    title: str = "",
    per_line: int = 8,
    least_side: int = 64,
) -> Image.Image:
    """Each of `rows`, by its label, is uint8 (B, C, H, W) of the same B, what belongs together in the same place. They
    are cut into lines of `per_line`; line by line the rows stand below each other.

    `columns`: what is written above each of the B, or nothing. Small pictures are enlarged without smoothing to
    `least_side` pixels; where rows have several sizes the smaller ones are brought to the largest.
    """
    shapes = [images.shape for images in rows.values()]
    count, largest = shapes[0][0], max(shape[-1] for shape in shapes)
    side = largest * max(1, -(-least_side // largest))
    size = max(12, side // 12)
    grey = all(shape[1] == 1 for shape in shapes)
    tiles = {label: _tiles(images if grey else as_rgb(images), side) for label, images in rows.items()}
    height, gap = max(tile.height for line in tiles.values() for tile in line), max(4, side // 32)
    per_line = min(per_line, count)

    labels = {label: wrapped(label, size, max(12 * size, side), lines=4) for label in rows}
    left = max((_width(lines, size) for lines in labels.values()), default=0) + (3 * gap if any(rows) else gap)
    width = left + per_line * (side + gap)
    heading = wrapped(title, size, max(width, int(LEAST_TITLE * 0.6 * size)) - 2 * gap, lines=6) if title else []
    above = [wrapped(text, size, side, lines=3) for text in columns]
    step, top = _line_height(size), len(heading) * _line_height(size) + 2 * gap
    captions = max(map(len, above), default=0) * step
    block = captions + len(rows) * (height + gap) + 2 * gap
    blocks = -(-count // per_line)

    canvas = Image.new(
        "L" if grey else "RGB", (max(width, _width(heading, size) + 2 * gap), top + blocks * block), "white"
    )
    draw, font = ImageDraw.Draw(canvas), _font(size)
    for number, text in enumerate(heading):
        draw.text((gap, gap + number * step), text, fill="black", font=font)
    for first in range(0, count, per_line):
        y = top + first // per_line * block
        for place in range(first, min(first + per_line, count)):
            x = left + (place - first) * (side + gap)
            lines = above[place] if above else []
            for number, text in enumerate(lines):  # the last line stands right above its picture
                at = (x, y + captions - (len(lines) - number) * step)
                draw.text(at, text, fill=(GREY,) * len(canvas.getbands()), font=font)
            for number, line in enumerate(tiles.values()):
                canvas.paste(line[place], (x, y + captions + number * (height + gap)))
        for number, lines in enumerate(labels.values()):
            middle = y + captions + number * (height + gap) + (height - len(lines) * step) // 2
            for place, text in enumerate(lines):
                at = (left - 2 * gap - font.getlength(text), middle + place * step)
                draw.text(at, text, fill=(GREY,) * len(canvas.getbands()), font=font)
    return canvas


def writable(texts: Sequence[str], word: str = "prompt") -> list[str]:
    """The texts on one line each; in place of one that the font cannot write, `word` and its number, from 1."""
    texts = [" ".join(str(text).split()) for text in texts]
    return [text if _can_write(text) else f"{word} {number}" for number, text in enumerate(texts, start=1)]


def wrapped(text: str, size: int, width: int, lines: int) -> list[str]:
    """`text` in at most that many lines of at most `width` pixels; what is left out is an ellipsis."""
    found, font = [], _font(size)
    for line in text.splitlines():
        current = ""
        for word in line.split(" "):
            if current and font.getlength(f"{current} {word}") > width:
                found.append(current)
                current = ""
            current = f"{current} {word}" if current else word
            while font.getlength(current) > width and len(current) > 1:
                fits = next(
                    n for n in range(len(current) - 1, 0, -1) if n == 1 or font.getlength(current[:n]) <= width
                )
                found.append(current[:fits])
                current = current[fits:]
        found.append(current)
    if len(found) > lines:
        last = found[lines - 1]
        while last and font.getlength(f"{last}\N{HORIZONTAL ELLIPSIS}") > width:
            last = last[:-1]
        found = [*found[: lines - 1], f"{last.rstrip()}\N{HORIZONTAL ELLIPSIS}"]
    return found


def _tiles(images: Tensor, side: int) -> list[Image.Image]:
    """(B, C, H, W) as pictures `side` wide: whole pixels repeated where that fits, else resampled."""
    scale = side // images.shape[-1]
    if side % images.shape[-1] == 0:
        images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    tiles = [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
    return [tile if tile.width == side else tile.resize((side, tile.height * side // tile.width)) for tile in tiles]


def _width(lines: Sequence[str], size: int) -> int:
    return max((int(_font(size).getlength(line)) + 1 for line in lines), default=0)


def _line_height(size: int) -> int:
    return round(1.3 * size)


def _can_write(text: str) -> bool:
    """Whether every letter is in the font and written left to right, by itself."""
    known = _known_letters()
    return all(
        ord(letter) in known and letter.isprintable() and unicodedata.bidirectional(letter) not in ("R", "AL")
        for letter in text
    )


@functools.cache
def _font_file() -> str:
    import matplotlib  # here and not above: what needs no picture need not wait for it

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _known_letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())
