# SPDX-License-Identifier: Apache-2.0
"""A stored image to 8 bits a channel: opened, turned upright, put on a background. What cannot be is said why."""

import io
import multiprocessing
import warnings

import fsspec
import numpy as np
from PIL import Image, ImageOps

BACKGROUND = "white"
SAID = multiprocessing.Value("b")  # that there are transparent pixels; one for all data workers, where they are forks
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap the sides


class UnreadableImage(ValueError):
    """Why a row gives no image: damaged, not there, or of values that 8 bits cannot keep."""


def open_stored(stored: dict | None) -> Image.Image:
    """The image of {"bytes", "path"} as Pillow opens it: its header read, its pixels not yet.

    Raises:
        UnreadableImage: whatever Pillow raises, and where there is nothing to open.
    """
    try:
        return Image.open(_source(stored))
    except Exception as error:  # its decoders raise what damaged bytes make of them: struct.error, SyntaxError ...
        raise _unreadable(error) from error


def read_image(stored: dict | None, mode: str, background: str) -> Image.Image:
    """The image of {"bytes", "path"}, upright, in `mode`: L, RGB or RGBA. In the first two transparent pixels are
    composed on `background`; of an animation it is the first frame.

    Raises:
        UnreadableImage: as `open_stored`, and for values that are not those of an 8-bit or 16-bit image.
    """
    with open_stored(stored) as opened:
        try:
            image = _eight_bit(ImageOps.exif_transpose(opened), opened.format)  # upright by its tag, as viewers do
            if mode != "RGBA" and image.has_transparency_data:
                image = _composed(image, background)
            return image.convert(mode)
        except Exception as error:
            raise _unreadable(error) from error


def upright_size(stored: dict | None) -> tuple[int, int]:
    """(width, height) as `read_image` gives them, from the header. Raises UnreadableImage."""
    with open_stored(stored) as image:
        try:
            tag = Image.Image.getexif(image).get(ORIENTATION)  # a PNG's own method would decode it, for a late tag
        except Exception as error:
            raise _unreadable(error) from error
        turned = tag in (5, 6, 7, 8) and image.format != "TIFF"  # whose size is that of the upright image already
        return image.size[::-1] if turned else image.size


def file_content(stored: dict | None) -> bytes:
    """The bytes of the image file; none where there are none to be read."""
    try:
        source = _source(stored)
        if isinstance(source, io.BytesIO):
            return source.getvalue()
        with open(source, "rb") as file:
            return file.read()
    except Exception:  # an archive's: BadZipFile, ReadError
        return b""


def is_url(path: str | None) -> bool:
    """Whether a path is no file of this machine; one within an archive is, `zip://inside.png::archive.zip`."""
    return "://" in (path or "").rsplit("::", 1)[-1]


def _source(stored: dict | None) -> io.BytesIO | str:
    content, path = (stored.get("bytes"), stored.get("path")) if stored else (None, None)
    if content:
        return io.BytesIO(content)
    if not path:
        raise UnreadableImage("the row holds no image")
    if is_url(path):
        raise UnreadableImage("it is a URL, and images are not downloaded here")
    if "://" in path:  # zip://inside.png::archive.zip; a :: alone is part of a name
        with fsspec.open(path, "rb") as file:
            return io.BytesIO(file.read())
    return path


def _unreadable(error: Exception) -> UnreadableImage:
    says_all = isinstance(error, (OSError, UnreadableImage)) and str(error)
    return UnreadableImage(str(error) if says_all else f"{type(error).__name__}: {error}")


def _eight_bit(image: Image.Image, format: str | None) -> Image.Image:
    """16-bit grey is scaled; integers and floats that are those of an 8-bit image stay what they are. Pillow's own
    conversions would clip them all at 255.

    Raises:
        UnreadableImage: other values.
    """
    full_scale = image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM"))
    if not full_scale and image.mode not in ("I", "F"):
        return image.convert("RGB") if image.mode == "LAB" else image  # which Pillow converts to nothing else
    values = np.asarray(image)
    low, high = (float(value) for value in (values.min(), values.max()))
    kind = "16 bits" if full_scale else "floats" if image.mode == "F" else "integers"
    found = f"it holds {kind} from {low:g} to {high:g}"
    if full_scale and 0 < high <= 255:
        raise UnreadableImage(f"{found}, which is black: of 16 bits white is 65535. Store such values as uint8")
    if full_scale:
        grey = Image.fromarray((values / 257).round().astype(np.uint8))
        if "transparency" in image.info:  # the grey value that stands for it
            seen = (values != image.info["transparency"]).astype(np.uint8) * 255
            grey = Image.merge("LA", (grey, Image.fromarray(seen)))
        return grey
    # 0 and 1 alone are more likely black and white than two blacks
    if not (low >= 0 and high <= 255 and high != 1 and (values == np.round(values)).all()):
        raise UnreadableImage(
            f"{found}, and an image's are whole, from 0, black, to 255, white: scale them and store them as uint8"
        )
    return Image.fromarray(values.astype(np.uint8))


def _composed(image: Image.Image, background: str) -> Image.Image:
    """On `background`; an image of which all pixels are opaque as it is."""
    alpha = image.convert("LA" if image.mode == "La" else "RGBA")
    if alpha.getchannel("A").getextrema()[0] == 255:
        return image
    with SAID.get_lock():
        first, SAID.value = not SAID.value, True
    if first:
        warnings.warn(
            f"there are transparent pixels: they are composed on {background}, see --background.", stacklevel=2
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, background), alpha.convert("RGBA"))
