# SPDX-License-Identifier: Apache-2.0
"""Which images a folder holds, for training and evaluation alike, and what is said of those that are left out."""

import json
import os
import warnings
from argparse import Namespace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils.data.rows import fingerprint, load_rows
from utils.evaluation.image_sets import image_files

FLAGS = {"dataset_name": None, "train_data_dir": None, "dataset_config_name": None, "image_column": "image"}


def save(folder: Path, *names: str) -> Path:
    """PNGs, whatever their names say, each of another grey."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path, "PNG")
    return folder


def rows_of(folder: Path, split: str | None = None, flag: str = "train_data_dir") -> datasets.Dataset:
    return load_rows(Namespace(**FLAGS | {flag: str(folder)}), split, split_flag="--train_split")


def names_of(folder: Path, *given) -> list[str]:
    """Of the images that training sees; nothing is left out, or it would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [os.path.relpath(image["path"], folder) for image in rows_of(folder, *given)["image"]]


def check_all_agree(folder: Path, names: set[str]) -> None:
    assert set(names_of(folder)) == names
    assert {os.path.relpath(path, folder) for path in image_files(str(folder), "--images")} == names


@pytest.mark.parametrize(
    "name",
    "steam train.png|eval.png|val-de-loire.png|test 1.png|my_dev.png|training-1.png|validation.png|data/train/x.png|"
    "Test/0.png|ünï/ö.png|a{b,c}.png|[x].png|UPPER.PNG|photo.jpg|x.JPEG|x.jfif|x.webp|x.avif|x.tif|x.bmp|x.gif|x.ppm|"
    "x.jp2|x.tga|__own/x.png|x.backup.png|1²2.png|٣.png".split("|"),
)
def test_every_image_is_used_whatever_it_is_called(tmp_path, name):
    check_all_agree(save(tmp_path, "0.png", "1.png", name), {"0.png", "1.png", name})


@pytest.mark.parametrize("name", ["a[b]", "s*", "q?", "{x,y}", "h#1", "p%20q", "e::x", ".hidden"])
def test_the_siblings_of_a_folder_are_not_used(tmp_path, name):
    for sibling in ("ab", "sx", "qx", "x"):
        save(tmp_path / sibling, "sibling.png")
    check_all_agree(save(tmp_path / name, "0.png", "1.png"), {"0.png", "1.png"})


def test_the_order_and_the_classes_are_those_of_the_datasets_library(tmp_path, monkeypatch):
    names = ["a-b/x.png", "a/x.png", "a/B.png", "Z/1.png", "a/10.png", "a/2.png", "é/u.png"]
    rows = rows_of(save(tmp_path / "images", *names))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    theirs = theirs["train"].cast_column("image", datasets.Image(decode=False))
    assert rows["image"][:] == theirs["image"][:] and rows["label"][:] == theirs["label"][:]
    assert rows.features["label"].names == theirs.features["label"].names == ["Z", "a", "a-b", "é"]
    # the classes are no part of the fingerprint, so that it is that of earlier versions
    assert fingerprint(rows) == fingerprint(theirs.remove_columns("label")) == fingerprint(rows.select(range(7)))
    assert rows_of(save(tmp_path / "flat", "0.png", "a/x.png")).column_names == ["image"]  # of two depths


def test_links_are_followed_once(tmp_path):
    save(tmp_path / "elsewhere", "e.png", "below/f.png")
    folder = save(tmp_path / "images", "0.png", "own/1.png")
    for name, target in {"linked": "../elsewhere", "twice": "../elsewhere/below", "cycle": ".", "up": ".."}.items():
        (folder / name).symlink_to(target)
    (folder / "own" / "back").symlink_to("..")
    (folder / "file.png").symlink_to("0.png")
    check_all_agree(folder, {"0.png", "own/1.png", "file.png", "linked/e.png", "linked/below/f.png"})


def test_what_is_left_out_is_counted(tmp_path):
    folder = save(tmp_path, "0.png", "1.png", ".2.png", "._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png")
    save(folder, "x.heic", "y.heic", "z", "1.png.bak", "film.mpg")
    (folder / "dead.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    for name in (".DS_Store", "Thumbs.db", "README.md", "0.txt"):
        (folder / name).write_text("no image")
    said = (
        r"--train_data_dir .*: 2 images used. Left out: .*2 images, links to nothing.* 6 files of other "
        r"kinds \(\.bak 1, \.heic 2, \.mpg 1, \.txt 1, no suffix 1\)"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        assert len(rows_of(folder)) == 2
    assert "4 images, hidden" in str(warned[0].message)
    with pytest.warns(UserWarning, match="--reference_images .*: 2 images used. Left out"):
        assert len(image_files(str(folder), "--reference_images")) == 2


# Splits


def test_a_split_of_a_folder_is_a_subfolder(tmp_path):
    folder = save(tmp_path, *(f"{part}/{i}.png" for part in ("train", "val", "holiday") for i in range(3)))
    assert len(names_of(folder)) == 9
    for split, part in {"train": "train", "validation": "val", "val": "val", "holiday": "holiday"}.items():
        with pytest.warns(UserWarning, match="3 images used. Left out: 6 images, in other subfolders"):
            found = rows_of(folder, split)["image"]
        assert {Path(image["path"]).parent.name for image in found} == {part}
    with pytest.raises(ValueError, match="--train_split: .* has no split 'test', only holiday, train, val"):
        rows_of(folder, "test")
    assert len(names_of(save(tmp_path / "flat", "0.png", "1.png"), "train")) == 2  # it has no other


def test_parts_of_a_dataset_that_are_used_alike_are_said(tmp_path):
    folder = save(tmp_path, "train/0.png", "Test/0.png")
    with pytest.warns(UserWarning, match="all 2 images are used, those of Test and train alike; --train_split takes"):
        assert len(rows_of(folder)) == 2
    with pytest.warns(UserWarning, match="--dataset_name .*: 1 image used. Left out: 1"):  # as on the Hub
        assert len(rows_of(folder, flag="dataset_name")) == 1


def test_a_folder_of_images_as_a_dataset(tmp_path):
    assert len(rows_of(save(tmp_path, "0.png", "steam train.png", "eval.png"), flag="dataset_name")) == 3


# Metadata


def save_metadata(folder: Path, kind: str, rows: list[dict]) -> None:
    table = pd.DataFrame(rows)
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        table.to_csv(folder / "metadata.csv", index=False)
    else:
        table.to_parquet(folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_in_the_order_of_the_metadata(tmp_path, kind):
    folder = save(tmp_path, "0.png", "test 1.png", "sub/2.png", "3.png")
    names = ["sub/2.png", "test 1.png", "0.png"]
    captions = ["two", None, "zero"]
    lines = [{"file_name": name, "text": text, "n": 1} for name, text in zip(names, captions, strict=True)]
    save_metadata(folder, kind, lines)
    with pytest.warns(UserWarning, match="3 images used. Left out: 1 image, that the metadata does not name"):
        rows = rows_of(folder)
    assert [os.path.relpath(image["path"], folder) for image in rows["image"]] == names
    assert rows["text"][:] == captions and set(rows.column_names) == {"image", "text", "n"}


def test_metadata_in_subfolders_and_of_other_images(tmp_path):
    folder = save(tmp_path, *(f"{part}/{i}.png" for part in "ab" for i in range(2)))
    save_metadata(folder / "a", "jsonl", [{"file_name": "1.png", "mask_file_name": "0.png", "text": ["x", "y"]}])
    save_metadata(folder / "b", "jsonl", [{"file_name": "0.png"}, {"file_name": "1.png", "text": []}])
    rows = rows_of(folder)
    assert [os.path.relpath(image["path"], folder) for image in rows["image"]] == ["a/1.png", "b/0.png", "b/1.png"]
    assert rows["text"][:] == [["x", "y"], None, []]
    assert rows["mask"][0]["path"] == str(folder / "a" / "0.png") and rows["mask"][1] is None


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"file": "0.png"}', "no column file_name, only file"),
        ('{"file_name": "../0.png"}', "names '../0.png'"),
        ('{"file_name": "/etc/passwd"}', "names '/etc/passwd'"),
        ('{"file_name": 3}', "names 3"),
        ('{"file_name": "0.png", "image": 1}', "has a column image beside file_name"),
        ("{no", "metadata.jsonl cannot be read"),
        ("", "metadata.jsonl cannot be read"),
        ('{"file_name": "0.png", "text": "a"}\n{"file_name": "0.png", "text": ["a"]}', "cannot be read: .*text"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, content, message):
    (save(tmp_path, "0.png") / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"--train_data_dir .*{message}"):
        rows_of(tmp_path)


def test_metadata_that_names_nothing_to_measure(tmp_path):
    save_metadata(save(tmp_path, "0.png"), "jsonl", [{"mask_file_name": "0.png"}])
    with pytest.raises(ValueError, match="--images .*: its metadata has no column file_name"):
        image_files(str(tmp_path), "--images")
    save_metadata(tmp_path, "jsonl", [{"file_name": "0.png"}, {"file_name": None}])
    assert image_files(str(tmp_path), "--images") == ["", str(tmp_path / "0.png")]  # as many as training has


def test_metadata_of_two_kinds(tmp_path):
    for kind in ("csv", "jsonl"):
        save_metadata(save(tmp_path, "0.png"), kind, [{"file_name": "0.png"}])
    with pytest.raises(ValueError, match="of several kinds, .*metadata.csv, .*metadata.jsonl"):
        rows_of(tmp_path)


# What is no folder of images


def test_what_is_no_folder_of_images(tmp_path):
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "train.parquet").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"--train_data_dir .* of other kinds .*\.parquet 1.* give it as --dataset_name"
    ):
        rows_of(tmp_path / "stored")
    with pytest.raises(ValueError, match="--train_data_dir .*: it is a file. Give a folder"):
        rows_of(tmp_path / "stored" / "train.parquet")
    with pytest.raises(ValueError, match="--dataset_name .* is a file. Give the folder it lies in"):
        rows_of(tmp_path / "stored" / "train.parquet", flag="dataset_name")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    with pytest.raises(ValueError, match="--dataset_name .* cannot be loaded as a dataset: .*scripts are no longer"):
        rows_of(tmp_path / "script", flag="dataset_name")
    (tmp_path / "stored").rename(tmp_path / "st[o]red")
    with pytest.raises(ValueError, match=r"--dataset_name .*takes \* \? \[ \] in a path for a pattern"):
        rows_of(tmp_path / "st[o]red", flag="dataset_name")


# Columns of arrays


@pytest.mark.parametrize(
    "values, shown",
    [
        ([[[0, 7], [128, 255]]], [[0, 7], [128, 255]]),
        ([[[[0, 1, 2], [3, 4, 5]]]], [[1, 4]]),  # green
        ([[[0.0, 7.0], [128.0, 255.0]]], [[0, 7], [128, 255]]),
        ([np.float16([[0, 7], [128, 255]])], [[0, 7], [128, 255]]),
    ],
)
def test_arrays_that_are_images(tmp_path, values, shown):
    from utils.data.transforms import ImageTransform

    datasets.Dataset.from_dict({"image": values}).to_parquet(tmp_path / "train.parquet")
    row = rows_of(tmp_path, flag="dataset_name")[0]
    found = ImageTransform("image", 3, min(np.shape(shown)), True, False).decode(row)
    np.testing.assert_array_equal(found[1].numpy(), shown)


@pytest.mark.parametrize(
    "value, message",
    [
        ([[[300, 0, 0]]], "from 0 to 300: in colour images these are whole numbers"),
        ([[[-1, 0, 0]]], "from -1 to 0: in colour"),
        ([[[0.5, 0.0, 1.0]]], "from 0.0 to 1.0: in colour"),
        ([1, 2, 3], "one row of values"),
        (["a.png"], "one row of values"),
        (3.5, "no images"),
        (
            "https://example.com/a.png",
            "holds URLs there, such as https://example.com/a.png. Download",
        ),
    ],
)
def test_arrays_that_are_not(tmp_path, value, message):
    datasets.Dataset.from_dict({"image": [value]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"--image_column image: .*{message}"):
        rows_of(tmp_path, flag="dataset_name")
