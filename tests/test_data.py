# SPDX-License-Identifier: Apache-2.0
"""Data: decoding, the stream of rows, and what is said of data that cannot be used."""

import io
import shutil
from argparse import Namespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import save_images
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

import utils.data.rows
from utils.data.rows import (
    ImageRows,
    ImageTransform,
    StreamSampler,
    fingerprint,
    load_rows,
    sample_batch,
    training_batches,
)
from utils.data.transforms import CaptionedTransform
from utils.flags import INTERPOLATIONS
from utils.randomness import StepRandom, counter_hash

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 18, 4), dtype=np.uint8)  # (H, W, RGBA)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def stored(image: Image.Image, format: str = "PNG", **settings) -> dict:
    """A row with the image as a dataset stores it."""
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return {"image": {"bytes": buffer.getvalue(), "path": None}}


def transform(channels=1, resolution=8, center_crop=False, random_flip=False) -> ImageTransform:
    return ImageTransform("image", channels, resolution, center_crop, random_flip)


def flags(**changes) -> Namespace:
    """The data flags, as parsed."""
    given = {"dataset_name": None, "train_data_dir": None, "dataset_config_name": None, "image_column": "image"}
    given |= {"max_train_samples": None, "train_batch_size": 4, "seed": 0, "dataloader_num_workers": 0}
    return Namespace(**{**given, **changes})


def save_files(folder, count=6, mode="L", side=8):
    """`count` PNG files."""
    folder.mkdir(parents=True)
    for index, row in enumerate(np.random.default_rng(1).integers(0, 256, (count, side, side), dtype=np.uint8)):
        Image.fromarray(row).convert(mode).save(folder / f"{index}.png")
    return folder


def save_rows(folder, features=None, **columns):
    """A parquet folder with these columns."""
    folder.mkdir(parents=True)
    features = features or {name: datasets.Image() if "image" in name else None for name in columns}
    table = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        table = table.cast_column(name, feature) if feature else table
    table.to_parquet(folder / "train.parquet")
    return folder


def as_bytes(pixels) -> list[dict]:
    return [stored(Image.fromarray(row))["image"] for row in pixels]


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


# Decode


@pytest.mark.parametrize("source", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_converts_the_mode(source, channels):
    image = Image.fromarray(PIXELS[:8, :8]).convert(source)
    found = transform(channels).decode(stored(image))
    if source == "RGBA" and channels < 4:
        image = Image.alpha_composite(Image.new("RGBA", (8, 8), "white"), image)
    expected = np.array(image.convert(MODES[channels])).reshape(8, 8, channels)
    assert found.dtype == torch.uint8 and found.shape == (channels, 8, 8) and found.is_contiguous()
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_decode_spreads_grey_over_rgb():
    grey = transform(3).decode(stored(Image.fromarray(PIXELS[:8, :8, 0])))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    np.testing.assert_array_equal(grey[0].numpy(), PIXELS[:8, :8, 0])


@pytest.mark.parametrize("settings", [{}, {"transparency": 3}])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_reads_palettes_as_colours_not_as_indices(channels, settings):
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    palette.putpalette([value for i in range(256) for value in (255 - i, (7 * i) % 256, 100)])
    found = transform(channels).decode(stored(palette, **settings))
    colours = np.array(palette.convert("RGB")).astype(float)
    if settings and channels < 4:
        colours[0, 3] = 255  # the transparent one, on white
    red, green, blue = colours.transpose(2, 0, 1)
    if channels == 1:
        expected = [0.299 * red + 0.587 * green + 0.114 * blue]
    else:
        expected = [
            red,
            green,
            blue,
            np.where(np.arange(64).reshape(8, 8) == 3, 0, 255) if settings else red * 0 + 255,
        ]
    for found_channel, expected_channel in zip(found, expected, strict=False):
        np.testing.assert_allclose(found_channel, expected_channel, atol=1)


def test_decode_scales_16_bit_grey():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = transform().decode(stored(Image.fromarray(values)))
    np.testing.assert_allclose(found[0], values / 257, atol=1)


def test_decode_turns_as_the_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the right side is the top
    row = stored(Image.fromarray(PIXELS[:8, :16, :3]), "JPEG", exif=exif.tobytes())
    assert datasets.Image().decode_example(row["image"]).size == (8, 16)
    assert transform(3).decode(row).shape == (3, 16, 8)


@pytest.mark.parametrize("resolution", [4, 12, 20, 24])
@pytest.mark.parametrize("turned", [False, True])
def test_decode_resizes_the_shorter_side(resolution, turned):
    image = Image.fromarray(PIXELS[..., 0])
    image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
    longer = round(18 / 12 * resolution)
    size = (resolution, longer) if turned else (longer, resolution)  # width, height
    found = transform(resolution=resolution).decode(stored(image))
    assert found.shape == (1, size[1], size[0])
    np.testing.assert_array_equal(found[0].numpy(), np.array(image.resize(size, Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_decode_resizes_as_told(name):
    image = Image.fromarray(PIXELS[..., 0])
    found = ImageTransform("image", 1, 4, False, False, interpolation=name).decode(stored(image))
    expected = image.resize((found.shape[2], found.shape[1]), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(found[0].numpy(), np.array(expected))
    assert InterpolationMode(name)  # whose names diffusers' flag has


@pytest.mark.parametrize("box", [(0, 0, 12, 18), (1, 2, 8, 8), (4, 0, 8, 10), (0, 17, 12, 1)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_the_box_is_the_picture(box, turned):
    """As torchvision's crop, then its resize: what the box leaves out is seen by nothing."""
    image, settings = Image.fromarray(PIXELS[..., :3]), ("image", 3, 8, False, False)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    upright = image.transpose(Image.Transpose.ROTATE_270) if turned else image
    box = (box[1], box[0], box[3], box[2]) if turned else box
    row = stored(image, exif=exif.tobytes())
    work = ImageTransform(*settings, crop=list(box))
    expected = functional.resize(functional.crop(upright, *box), 8)
    np.testing.assert_array_equal(work.decode(row).permute(1, 2, 0).numpy(), np.array(expected))
    told = CaptionedTransform(*settings, crop=box, caption_column="text", tokenizers=[], micro_conditioning=True)
    assert told._time_ids(work.decode(row), row["image"], np.uint64(0))[:2] == box[2:]


@pytest.mark.parametrize("box", [(1, 0, 12, 18), (0, 1, 12, 18), (0, 0, 13, 4), (40, 40, 2, 2)], ids=str)
def test_a_box_beyond_the_image_names_it(tmp_path, box):
    save_rows(tmp_path / "d", image=[stored(Image.fromarray(PIXELS[..., :3]))["image"]])
    rows = load_rows(flags(dataset_name=str(tmp_path / "d")))
    work = ImageTransform("image", 3, 8, False, False, crop=box)
    numbers = " ".join(map(str, box))
    with pytest.raises(ValueError, match=rf"^row 0 .*--crop {numbers} goes beyond its 12 rows and 18 columns"):
        ImageRows(rows, work, 0, quiet=True)


def test_every_image_setting_is_a_field():
    """The key of a cache is made of them."""
    plain, *others = (
        vars(ImageTransform("image", 3, 8, False, False, **changes))
        for changes in ({}, {"crop": [0, 0, 8, 8]}, {"crop": [0, 1, 8, 8]}, {"interpolation": "bicubic"})
    )
    assert all(other != plain for other in others) and others[0] != others[1]


@pytest.mark.parametrize("size", [(8, 8), (8, 11), (13, 8)])
def test_decode_leaves_pixels_alone_at_the_right_size(size):
    image = Image.fromarray(PIXELS[: size[0], : size[1], 0])  # a part of the pixels where it would be larger
    image = image.crop((0, 0, size[1], size[0]))
    found = transform().decode(stored(image))
    np.testing.assert_array_equal(found[0].numpy(), np.array(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 1000), (7, 7), (9, 9), (16, 17)])
def test_decode_and_augment_end_at_the_resolution(size):
    image = Image.new("L", size, 128)
    work = transform(random_flip=True)
    decoded = work.decode(stored(image))
    assert min(decoded.shape[1:]) == 8
    for bits in (0, 2**64 - 1, 12345678901234567890):
        assert work.augment(decoded, bits).shape == (1, 8, 8)


def test_a_line_of_pixels_is_not_blown_up():
    with pytest.raises(ValueError, match="1x50000 pixels would become 64x3200000"):
        transform(resolution=64).decode(stored(Image.new("L", (1, 50_000))))


def test_decode_reads_a_path(tmp_path):
    Image.fromarray(PIXELS[:8, :8, 0]).save(tmp_path / "a.png")
    found = transform().decode({"image": {"bytes": None, "path": str(tmp_path / "a.png")}})
    np.testing.assert_array_equal(found[0].numpy(), PIXELS[:8, :8, 0])


# Augment


@pytest.mark.parametrize("shape", [(8, 11), (13, 8), (10, 9)])
def test_center_crop(shape):
    image = torch.arange(shape[0] * shape[1], dtype=torch.int32).reshape(1, *shape)
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    for bits in (0, 2**64 - 2):
        assert torch.equal(transform(center_crop=True).augment(image, bits), image[:, top : top + 8, left : left + 8])


def test_random_crop_covers_every_place_evenly():
    image = torch.arange(10 * 12, dtype=torch.int32).reshape(1, 10, 12)
    hashes = counter_hash(0, 0, np.arange(3000))
    counts = np.zeros((3, 5), dtype=int)
    for bits in hashes:
        crop = transform().augment(image, int(bits))
        top, left = divmod(int(crop[0, 0, 0]), 12)
        assert torch.equal(crop, image[:, top : top + 8, left : left + 8])
        counts[top, left] += 1
    assert counts.min() > 200 * 0.7 and counts.max() < 200 * 1.3


def test_flip_is_exact_and_hits_half():
    image = torch.from_numpy(PIXELS[:8, :8]).permute(2, 0, 1)
    hashes = counter_hash(0, 0, np.arange(2000))
    outcomes = [transform(4, random_flip=True).augment(image, int(bits)) for bits in hashes]
    flipped = [torch.equal(outcome, image.flip(-1)) for outcome in outcomes]
    kept = [torch.equal(outcome, image) for outcome in outcomes]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert abs(np.mean(flipped) - 0.5) < 0.05
    assert all(torch.equal(transform(4).augment(image, int(bits)), image) for bits in hashes[:50])


def wide_rows(folder, count=40):
    """Rows wider than high, so that crops show."""
    pixels = np.random.default_rng(2).integers(0, 256, (count, 8, 13), dtype=np.uint8)
    return load_rows(flags(dataset_name=str(save_rows(folder, image=as_bytes(pixels)))))


def test_augmentation_depends_on_seed_epoch_and_row(tmp_path):
    rows = wide_rows(tmp_path / "data")
    whole = [(0, row) for row in range(40)]

    def batch(seed, positions):
        torch.manual_seed(seed * 31 + len(positions))
        return ImageRows(rows, transform(random_flip=True), seed, quiet=True).__getitems__(positions)["pixels"]

    expected = batch(3, whole)
    assert torch.equal(batch(3, whole), expected)
    assert torch.equal(batch(3, whole[::-1]), expected.flip(0))
    assert torch.equal(batch(3, whole[17:18])[0], expected[17])
    for other in (batch(4, whole), batch(3, [(1, row) for row in range(40)])):
        assert (other != expected).flatten(1).any(dim=1).float().mean() > 0.7


@pytest.mark.parametrize("limit", [0, 40 * 64 - 1])
def test_held_and_not_held_are_equal(tmp_path, monkeypatch, limit):
    rows = wide_rows(tmp_path / "data")
    positions = [(epoch, row) for epoch in range(2) for row in (0, 39, 5, 5)]
    held = ImageRows(rows, transform(random_flip=True), 1, quiet=True)
    monkeypatch.setattr(utils.data.rows, "HOLD_IN_MEMORY_BYTES", limit)
    read = ImageRows(rows, transform(random_flip=True), 1, quiet=True)
    assert len(held.held) == len(held) == len(read) == 40 and read.held is None
    expected, found = held.__getitems__(positions), read.__getitems__(positions)
    assert torch.equal(found["pixels"], expected["pixels"])
    assert found["row"].tolist() == expected["row"].tolist() == [0, 39, 5, 5] * 2
    monkeypatch.setattr(utils.data.rows, "HOLD_IN_MEMORY_BYTES", 40 * 64)
    assert ImageRows(rows, transform(), 1, quiet=True).held is not None


def test_sample_batch_is_distinct_rows_the_same_every_time(data_dir):
    dataset = ImageRows(load_rows(flags(dataset_name=data_dir)), transform(), 0, quiet=True)
    batch = sample_batch(dataset, 10, 5)
    assert len(set(batch["row"].tolist())) == 10
    assert torch.equal(sample_batch(dataset, 10, 5)["pixels"], batch["pixels"])
    assert not torch.equal(sample_batch(dataset, 10, 6)["row"], batch["row"])
    assert len(sample_batch(dataset, 100, 5)["row"]) == 24


# The stream


@pytest.mark.parametrize("num_rows, batch_size", [(12, 4), (10, 4), (7, 3), (5, 12), (1, 3), (6, 1)])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_every_epoch_visits_every_row_once(num_rows, batch_size, first):
    last = 3 * num_rows + 5
    batches = list(StreamSampler(num_rows, batch_size, 0, last=last))
    assert len(batches) == last and {len(batch) for batch in batches} == {batch_size}
    stream = [position for batch in batches for position in batch]
    assert [epoch for epoch, _ in stream] == [place // num_rows for place in range(len(stream))]
    orders = [[row for _, row in stream[start : start + num_rows]] for start in range(0, len(stream), num_rows)]
    for order in orders[: len(stream) // num_rows]:
        assert sorted(order) == list(range(num_rows))
    if num_rows >= 5:
        assert len({tuple(order) for order in orders}) > 1
    tail = StreamSampler(num_rows, batch_size, 0, first=first, last=last)
    assert list(tail) == batches[first:] and len(tail) == last - first
    assert all(isinstance(number, int) for position in stream for number in position)


@pytest.mark.parametrize("num_rows, batch_size", [(24, 4), (10, 3), (5, 7)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_interleaved_are_one_rank_with_the_whole_batch(num_rows, batch_size, world_size):
    ranks = [
        StreamSampler(num_rows, batch_size, 4, rank=rank, world_size=world_size, first=2, last=12)
        for rank in range(world_size)
    ]
    whole = StreamSampler(num_rows, batch_size * world_size, 4, first=2, last=12)
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == list(whole)


def test_other_seeds_give_other_streams():
    one, other = (next(iter(StreamSampler(100, 100, seed, last=1))) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("hold", [0, 2**20])
def test_workers_change_nothing(tmp_path, monkeypatch, accelerator, hold):
    monkeypatch.setattr(utils.data.rows, "HOLD_IN_MEMORY_BYTES", hold)
    rows = wide_rows(tmp_path / "data", count=10)
    expected = None
    for workers in (0, 2):
        dataset = ImageRows(rows, transform(random_flip=True), 3, quiet=True)
        args = flags(seed=3, dataloader_num_workers=workers)
        found = []
        for micro_step, (batch, rng) in enumerate(training_batches(dataset, args, accelerator, first=2, last=9), 2):
            assert set(batch) == {"pixels", "row"}
            noise = rng.normal((4, 2))
            assert torch.equal(noise, StepRandom(3, micro_step).normal((4, 2)))
            found.append((batch["row"], batch["pixels"], noise, torch.rand(3)))
        assert len(found) == 7
        positions = list(StreamSampler(10, 4, 3, first=2, last=9))
        for (row, pixels, *_), place in zip(found, positions, strict=True):
            assert row.tolist() == [row for _, row in place]
            assert torch.equal(pixels, dataset.__getitems__(place)["pixels"])
        expected = expected or found
        for step, other in zip(expected, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))


# Datasets


@pytest.mark.parametrize("kind", ["dataset_name", "train_data_dir"])
def test_both_kinds_of_folder_load(tmp_path, kind):
    if kind == "dataset_name":
        folder = save_images(tmp_path / "data", count=6)
    else:
        folder = save_files(tmp_path / "data")
    rows = load_rows(flags(**{kind: str(folder)}))
    assert len(rows) == 6 and "image" in rows.column_names
    dataset = ImageRows(rows, transform(), 0, quiet=True)
    if kind == "train_data_dir":
        for index in range(6):
            pixels = np.array(Image.open(folder / f"{index}.png"))
            np.testing.assert_array_equal(dataset.held[index][0].numpy(), pixels)
    assert sorted(sample_batch(dataset, 6, 0)["row"].tolist()) == list(range(6))


def test_imagefolder_in_class_folders(tmp_path):
    save_files(tmp_path / "data" / "cats", count=3)
    save_files(tmp_path / "data" / "dogs", count=2)
    assert len(load_rows(flags(train_data_dir=str(tmp_path / "data")))) == 5


def test_another_image_column(tmp_path):
    folder = save_rows(tmp_path / "data", images=as_bytes(PIXELS[None, :8, :8, 0]))
    rows = load_rows(flags(dataset_name=str(folder), image_column="images"))
    work = ImageTransform("images", 1, 8, True, False)
    np.testing.assert_array_equal(ImageRows(rows, work, 0, quiet=True).held[0][0].numpy(), PIXELS[:8, :8, 0])


@pytest.mark.parametrize("given, length", [(5, 5), (24, 24), (1000, 24), (None, 24)])
def test_max_train_samples_cuts_the_train_split_alone(data_dir, given, length):
    args = flags(dataset_name=data_dir, max_train_samples=given)
    rows = load_rows(args)
    assert len(rows) == length and rows["label"][:5] == [0, 1, 2, 3, 4]
    assert len(load_rows(args, "test")) == 24


def test_missing_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match="--train_data_dir .*missing.*no such folder"):
        load_rows(flags(train_data_dir=missing))
    with pytest.raises(ValueError, match="--dataset_name .*missing"):
        load_rows(flags(dataset_name=missing))


@pytest.mark.parametrize("kind", ["dataset_name", "train_data_dir"])
def test_empty_folders(tmp_path, kind):
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"--{kind} .*empty"):
        load_rows(flags(**{kind: str(tmp_path / "data")}))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(ValueError, match="--train_data_dir .*cannot be loaded"):
        load_rows(flags(train_data_dir=str(tmp_path)))


def test_wrong_columns_and_splits(data_dir):
    with pytest.raises(ValueError, match="--image_column picture.*image, label"):
        load_rows(flags(dataset_name=data_dir, image_column="picture"))
    with pytest.raises(ValueError, match="--validation_split.*'valid'.*train, test"):
        load_rows(flags(dataset_name=data_dir), "valid", split_flag="--validation_split")


def test_no_train_split(tmp_path):
    folder = save_images(tmp_path / "data", count=3)
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="--dataset_name.*'train'.*test"):
        load_rows(flags(dataset_name=str(folder)))


@pytest.mark.parametrize("kind", ["bytes", "paths", "structs"])
def test_columns_that_are_not_declared_as_images(tmp_path, kind):
    """As pandas and others write parquet: raw bytes, paths, or both, without the library's own type."""
    pixels = np.random.default_rng(6).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    values = as_bytes(pixels)
    if kind == "bytes":
        values = [value["bytes"] for value in values]
    elif kind == "paths":
        values = [str(path) for path in sorted(save_files(tmp_path / "files", count=3).iterdir())]
        pixels = [np.array(Image.open(path)) for path in values]
    folder = save_rows(tmp_path / "data", features={"image": None}, image=values)
    dataset = ImageRows(load_rows(flags(dataset_name=str(folder))), transform(), 0, quiet=True)
    for held, expected in zip(dataset.held, pixels, strict=True):
        np.testing.assert_array_equal(held[0].numpy(), expected)


def test_a_column_that_holds_no_images(data_dir):
    with pytest.raises(ValueError, match="--image_column label"):
        load_rows(flags(dataset_name=data_dir, image_column="label"))


# Images that cannot be decoded


def with_exif(content: bytes) -> dict:
    """A PNG whose pixels are whole, and whose tags are `content`."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG", exif=content)
    return {"bytes": buffer.getvalue(), "path": None}


NO_IMAGE = {
    "garbage": {"bytes": b"not an image", "path": None},
    "nothing": {"bytes": b"", "path": None},
    "null": None,
    "dead path": {"bytes": None, "path": "/nowhere/1.png"},
    "a folder": {"bytes": None, "path": "/"},
    "URL": {"bytes": None, "path": "https://example.com/1.png"},
    "archive": {"bytes": None, "path": "zip://1.png::/nowhere/1.zip"},
    "tags": with_exif(b"Exif\0\0broken tags"),  # a SyntaxError
    "floats": stored(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")["image"],
}


def damaged(folder, where):
    """6 rows of 8x8 images, but for those that `where` lists by what they hold instead."""
    images = as_bytes(np.random.default_rng(3).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    for kind, rows in where.items():
        for row in rows:
            images[row] = NO_IMAGE[kind]
    return load_rows(flags(dataset_name=str(save_rows(folder, {"image": None}, image=images))))


@pytest.mark.parametrize("hold", [0, 2**20])
@pytest.mark.parametrize("kind", NO_IMAGE)
def test_a_damaged_image_is_named(tmp_path, monkeypatch, hold, kind):
    monkeypatch.setattr(utils.data.rows, "HOLD_IN_MEMORY_BYTES", hold)
    rows = damaged(tmp_path / "data", {kind: [4]})
    with pytest.raises(ValueError, match="row 4 .*cannot be decoded.*--skip_bad_images"):
        ImageRows(rows, transform(), 0, quiet=True).__getitems__([(0, 1), (0, 4)])
    chosen = [5, 4, 1]
    with pytest.raises(ValueError, match="row 4 .*cannot be decoded"):  # of the dataset, whatever was chosen of it
        ImageRows(rows.select(chosen), transform(), 0, numbers=chosen, quiet=True).__getitems__([(0, 1)])


def test_a_damaged_file_is_named_by_its_path(tmp_path):
    folder = save_files(tmp_path / "data")
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"row 3 \(.*3\.png\) cannot be decoded"):
        ImageRows(load_rows(flags(train_data_dir=str(folder))), transform(), 0, quiet=True)


@pytest.mark.parametrize("hold", [0, 2**20])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_good_row_stands_in(tmp_path, monkeypatch, accelerator, hold, workers):
    monkeypatch.setattr(utils.data.rows, "HOLD_IN_MEMORY_BYTES", hold)
    rows = damaged(tmp_path / "data", {"garbage": [2], "tags": [3], "null": [5]})
    dataset = ImageRows(rows, transform(), 0, skip_bad_images=True, quiet=True)
    batch = dataset.__getitems__([(0, row) for row in range(6)])
    good = {row: transform().decode(rows[row]) for row in (0, 1, 4)}
    for found, row in zip(batch["pixels"], (0, 1, 4, 4, 4, 0), strict=True):
        assert torch.equal(found, good[row])
    assert batch["row"].tolist() == list(range(6))
    assert batch["replaced"].tolist() == [False, False, True, True, False, True]

    dataset = ImageRows(rows, transform(), 0, skip_bad_images=True, quiet=True)
    args = flags(train_batch_size=3, dataloader_num_workers=workers)
    seen = [batch for batch, _ in training_batches(dataset, args, accelerator, first=0, last=4)]
    assert dataset.bad_rows == {2, 3, 5}
    assert sorted(torch.cat([batch["row"] for batch in seen]).tolist()) == sorted([*range(6)] * 2)


def test_nothing_but_damaged_images(tmp_path):
    with pytest.raises(ValueError, match="none of 6 images can be decoded; the last: it holds floats from 0 to 1"):
        ImageRows(damaged(tmp_path / "data", {"floats": range(6)}), transform(), 0, skip_bad_images=True, quiet=True)


# Fingerprint


@pytest.mark.parametrize("kind", ["dataset_name", "train_data_dir"])
def test_fingerprint_follows_the_content_not_the_place(tmp_path, kind):
    if kind == "dataset_name":
        folder = save_images(tmp_path / "here", count=6)
    else:
        folder = save_files(tmp_path / "here")
    shutil.copytree(folder, tmp_path / "there")
    one, other = (fingerprint(load_rows(flags(**{kind: str(tmp_path / name)}))) for name in ("here", "there"))
    assert one == other and len(one) == 16


@pytest.mark.parametrize("count", [6, 100])
@pytest.mark.parametrize("changed", ["first pixel", "last pixel", "label", "size", "order", "column"])
def test_fingerprint_sees_changes(tmp_path, changed, count):
    pixels = np.random.default_rng(4).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    before = save_rows(tmp_path / "before", image=as_bytes(pixels), label=list(range(count)))
    columns = {"image": as_bytes(pixels), "label": list(range(count))}
    if "pixel" in changed:
        row = 0 if changed == "first pixel" else -1
        pixels[row, 3, 3] ^= 1
        columns["image"] = as_bytes(pixels)
    elif changed == "label":
        columns["label"][0] = 77
    elif changed == "size":
        columns = {name: values[:-1] for name, values in columns.items()}
    elif changed == "order":
        columns["image"] = columns["image"][::-1]
    else:
        columns["name"] = columns.pop("label")
    after = save_rows(tmp_path / "after", **columns)
    one, other = (fingerprint(load_rows(flags(dataset_name=str(folder)))) for folder in (before, after))
    assert one != other


@pytest.mark.parametrize("other", ["image2", "meta", "words"])
def test_fingerprint_reads_any_other_column(tmp_path, other):
    pixels = np.random.default_rng(5).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    columns = {
        "image2": as_bytes(pixels),  # masks, thumbnails: an image that stays decoded
        "meta": [{"width": row} for row in range(3)],
        "words": [["a", "b"]] * 3,
    }
    folder = save_rows(tmp_path / "data", image=as_bytes(pixels), **{other: columns[other]})
    prints = {fingerprint(load_rows(flags(dataset_name=str(folder)))) for _ in range(3)}
    assert len(prints) == 1


def test_fingerprint_reads_rows_without_an_image(tmp_path):
    where = {kind: [row] for row, kind in enumerate(("garbage", "nothing", "null", "dead path", "a folder", "URL"))}
    one, other = (fingerprint(damaged(tmp_path / name, where)) for name in ("data", "copy"))
    assert one == other


def test_a_cache_that_cannot_be_written_is_told_from_the_data(data_dir, tmp_path, monkeypatch):
    """As where HOME is nobody's, in some containers."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="--dataset_name .* cannot be loaded .*--cache_dir, or HF_HOME"):
        load_rows(flags(dataset_name=data_dir))
