# SPDX-License-Identifier: Apache-2.0
"""Images of all kinds to 8 bits: values that are kept or refused, transparency, and damage of every sort."""

import io
import multiprocessing
import warnings

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import utils.data.images
from utils.data.images import UnreadableImage, file_content, read_image, upright_size

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17


def stored(image: Image.Image, format: str = "PNG", **settings) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def read(image: Image.Image, mode: str = "L", background: str = "white", **settings) -> np.ndarray:
    return np.asarray(read_image(stored(image, **settings), mode, background))


def pgm(values: np.ndarray, most: int) -> dict:
    return {"bytes": b"P5 4 4 %d\n" % most + values.astype(">u2").tobytes(), "path": None}


# Values


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint32, np.int16])
def test_integers_and_floats_of_8_bits_keep_their_values(dtype):
    values = GREY.astype(dtype)
    values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)  # as the datasets library stores them
    image = Image.fromarray(values)
    np.testing.assert_array_equal(read(image, format="TIFF"), GREY)
    np.testing.assert_array_equal(read(image, "RGB", format="TIFF")[..., 2], GREY)
    assert not read(Image.fromarray(values * 0), format="TIFF").any()


@pytest.mark.parametrize(
    "values, found",
    [
        (np.linspace(0, 1, 16, dtype=np.float32), "floats from 0 to 1,"),
        (np.linspace(-1, 1, 16, dtype=np.float32), "floats from -1 to 1,"),
        (np.linspace(0, 200, 16, dtype=np.float32), "floats from 0 to 200,"),
        (np.float32([0, 1] * 8), "floats from 0 to 1,"),
        (np.float32([0, np.nan] * 8), "floats from nan"),
        (np.arange(16, dtype=np.int32) * 100, "integers from 0 to 1500,"),
        (np.arange(16, dtype=np.int32) - 1, "integers from -1 to 14,"),
        (np.int32([0, 1] * 8), "integers from 0 to 1,"),
        (np.arange(16, dtype=np.uint16) * 17, "16 bits from 0 to 255, which is black"),
    ],
)
def test_other_values_are_refused(values, found):
    image = Image.fromarray(values.reshape(4, 4))
    for mode in ("L", "RGB", "RGBA"):
        with pytest.raises(UnreadableImage, match=f"it holds {found}.* uint8"):
            read_image(stored(image, "TIFF"), mode, "white")


def test_16_bits_are_scaled_in_every_format():
    values = GREY.astype(np.uint16) * 257
    for row in (stored(Image.fromarray(values)), stored(Image.fromarray(values), "TIFF"), pgm(values, 65535)):
        np.testing.assert_array_equal(np.asarray(read_image(row, "L", "white")), GREY)
    np.testing.assert_allclose(np.asarray(read_image(pgm(GREY.astype(int) * 4, 1020), "L", "white")), GREY, atol=1)
    assert not np.asarray(read_image(stored(Image.fromarray(values * 0)), "L", "white")).any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "I;16", "RGBX"])
def test_every_mode_is_read(mode):
    shades = np.resize(np.uint8([0, 255] if mode == "1" else [0, 51, 102, 153, 204, 255]), (4, 4))  # of any palette
    colours = Image.fromarray(np.stack([shades] * 3, axis=-1))
    if mode == "I;16":
        image = Image.fromarray(shades.astype(np.uint16) * 257)
    else:
        image = colours.convert("P").convert("PA") if mode == "PA" else colours.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of it is transparent
        for wanted, bands in {"L": 1, "RGB": 3, "RGBA": 4}.items():
            found = read(image, wanted, format="TIFF").reshape(4, 4, bands)
            np.testing.assert_allclose(found[..., 0].astype(int), shades, atol=2)


def test_of_an_animation_the_first_frame():
    frames = [Image.fromarray(GREY + add) for add in (0, 3)]
    np.testing.assert_array_equal(read(frames[0], format="GIF", save_all=True, append_images=frames[1:]), GREY)


# Transparency


HIDDEN = Image.merge("RGBA", [Image.new("L", (2, 1), value) for value in (0, 0, 200)] + [Image.new("L", (2, 1))])
SEEN = HIDDEN.copy()
SEEN.putpixel((1, 0), (0, 0, 200, 255))


@pytest.mark.filterwarnings("ignore:there are transparent pixels")
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "GIF"])
def test_transparent_pixels_are_of_the_background(format):
    for background, colour in {"white": (255, 255, 255), "#ff0000": (255, 0, 0)}.items():
        found = read(SEEN, "RGB", background, format=format, **({"lossless": True} if format == "WEBP" else {}))
        assert tuple(found[0, 0]) == colour and tuple(found[0, 1]) == (0, 0, 200)


@pytest.mark.filterwarnings("ignore:there are transparent pixels")
@pytest.mark.parametrize(
    "image, settings, first",
    [
        (HIDDEN, {}, 255),
        (HIDDEN.convert("LA"), {}, 255),
        (SEEN.convert("P"), {}, 255),
        (Image.new("P", (2, 1)), {"transparency": 0}, 255),
        (Image.new("P", (2, 1)), {"transparency": bytes([51])}, 204),
        (Image.new("L", (2, 1), 7), {"transparency": 7}, 255),
        (Image.new("RGB", (2, 1), (1, 2, 3)), {"transparency": (1, 2, 3)}, 255),
        (Image.new("1", (2, 1)), {"transparency": 0}, 255),
        (Image.fromarray(np.uint16([[5000, 60000]])), {"transparency": 5000}, 255),
    ],
    ids=["RGBA", "LA", "palette of RGBA", "palette", "half", "grey", "RGB", "1", "16 bits"],
)
def test_every_kind_of_transparency(image, settings, first):
    for mode in ("L", "RGB"):
        assert read(image, mode, **settings)[0, 0].max() == first
    if not settings or "16" in image.mode:
        assert read(image, "RGBA", **settings)[0, 0, 3] == 0  # which a model of 4 channels sees


def test_transparency_is_said_once(recwarn, monkeypatch):
    monkeypatch.setattr(utils.data.images, "SAID", multiprocessing.Value("b"))
    for _ in range(2):
        read(HIDDEN, "RGB", "black")
    (said,) = (str(each.message) for each in recwarn if "transparent" in str(each.message))
    assert "composed on black, see --background" in said


class Transparent(Dataset):
    """Of three rows the last two: with two data workers each sees one."""

    def __getitem__(self, row: int) -> tuple[int, int]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read(HIDDEN if row else Image.new("RGB", (2, 2)), "RGB", "black")
        return row, len(caught)


def test_transparency_is_said_by_one_data_worker_whichever_it_is(monkeypatch):
    for rows in ([1], [0, 1], [1, 1, 1, 1]):
        monkeypatch.setattr(utils.data.images, "SAID", multiprocessing.Value("b"))
        loader = DataLoader(Transparent(), sampler=rows, num_workers=2, multiprocessing_context="fork")
        assert sum(said.item() for _, said in loader) == 1, rows


# Damage


@pytest.mark.filterwarnings("ignore")  # of Pillow, beside or before what it raises
def test_nothing_but_its_own_exception_comes_of_damaged_bytes():
    """Bytes changed at random: Pillow raises OSError, ValueError, SyntaxError, RuntimeError, TypeError and others."""
    random, colours = np.random.default_rng(0), Image.fromarray(np.stack([GREY] * 3, axis=-1))
    exif = Image.Exif()
    exif[0x0112] = 6
    unreadable = 0
    for format in "PNG JPEG TIFF GIF BMP WEBP PPM TGA ICO DDS BLP QOI PCX ICNS".split():
        settings = {"exif": exif.tobytes()} if format in ("PNG", "JPEG", "TIFF", "WEBP") else {}
        whole = stored(colours.convert("P") if format == "BLP" else colours, format, **settings)["bytes"]
        for _ in range(40):
            content = bytearray(whole[: random.integers(len(whole) // 2, len(whole) + 1)])
            content[random.integers(0, min(len(content), 120))] = random.integers(0, 256)
            row = {"bytes": bytes(content), "path": None}
            for use in (lambda row: read_image(row, "RGB", "white"), upright_size):
                try:
                    use(row)
                except UnreadableImage as error:
                    assert str(error)
                    unreadable += 1
    assert unreadable > 300


def test_colons_in_a_name_are_no_archive(tmp_path):
    (tmp_path / "a::b").mkdir()
    for name in ("a::b/0.png", "zip::0.png"):
        Image.fromarray(GREY).save(tmp_path / name)
        row = {"bytes": None, "path": str(tmp_path / name)}
        np.testing.assert_array_equal(np.asarray(read_image(row, "L", "white")), GREY)
        assert upright_size(row) == (4, 4) and file_content(row) == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("kind", ["zip", "tar", "gzip"])
def test_a_damaged_archive_holds_no_image_and_no_bytes(tmp_path, kind):
    (tmp_path / "damaged").write_bytes(b"PK")
    row = {"bytes": None, "path": f"{kind}://0.png::{tmp_path}/damaged"}
    for use in (lambda row: read_image(row, "L", "white"), upright_size):
        with pytest.raises(UnreadableImage):
            use(row)
    assert file_content(row) == b""


def test_a_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        read(Image.fromarray(GREY))


@pytest.mark.parametrize("tag", range(9))
def test_the_upright_size_is_that_of_the_upright_image(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    for format in ("PNG", "JPEG", "WEBP", "TIFF"):
        row = stored(Image.new("RGB", (5, 3)), format, exif=exif)
        assert upright_size(row) == read_image(row, "RGB", "white").size == ((3, 5) if tag > 4 else (5, 3))
