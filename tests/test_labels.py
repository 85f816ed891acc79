# SPDX-License-Identifier: Apache-2.0
"""Class labels of datasets: from columns and from folders, and those that are not the model's."""

import shutil

import datasets
import pytest
from latent_pipelines import save_classes

from utils.command_line import UsageError
from utils.data.folders import folder_rows
from utils.data.labels import LabelTransform, class_names, read_labels
from utils.data.rows import ImageRows, fingerprint

CLASSES = 5


def rows_of(labels, feature=None) -> datasets.Dataset:
    pictures = [{"bytes": b"", "path": None}] * len(labels)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": feature or datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def transform(column: str = "label") -> LabelTransform:
    return LabelTransform("image", 3, 32, True, False, label_column=column, num_classes=CLASSES)


BAD_LABELS = {
    "too large": ([0, 5], None, "row 1 has label 5; the model knows the classes 0 to 4"),
    "unlabelled": ([-1, 0], None, "row 0 has label -1"),
    "absent": ([0, None], None, "row 1 has label None"),
    "names": (["cat", "dog"], datasets.Value("string"), "found .*string.* there; a label is an integer from 0 to 4"),
    "several": ([[0], [1]], datasets.List(datasets.Value("int64")), "found List.* there; a label is an integer"),
}


@pytest.mark.parametrize("labels, feature, message", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_the_teacher_does_not_know_are_refused(labels, feature, message):
    with pytest.raises(UsageError, match=f"--label_column label: {message}"):
        transform().check(rows_of(labels, feature))


def test_labels_of_columns_are_taken():
    for feature in (None, datasets.Value("uint8"), datasets.ClassLabel(names=["a", "b"])):
        transform().check(rows_of([0, 1, 1], feature))
    with pytest.raises(UsageError, match="--label_column fine: the dataset has no such column, only image, label"):
        transform("fine").check(rows_of([0]))


def test_class_folders_are_labels(tmp_path):
    rows = folder_rows(str(save_classes(tmp_path / "images")), "--train_data_dir")
    batch = ImageRows(rows, transform(), 0, quiet=True).__getitems__([(0, row) for row in range(len(rows))])
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    (tmp_path / "images" / "a").rename(tmp_path / "images" / "z")  # the same pictures, told other classes
    other = folder_rows(str(tmp_path / "images"), "--train_data_dir")
    assert fingerprint(rows, ["label"]) != fingerprint(other, ["label"])


@pytest.mark.parametrize(
    "names, message",
    [
        ("abcd", "4 class folders.* and the model knows 5 classes"),
        (["1", "2", "3", "4", "10"], "the class folder 1 would be label 0"),
        ("", "the dataset has no such column, only image. A folder of images has labels where every class"),
    ],
)
def test_class_folders_that_cannot_be_told_are_refused(tmp_path, names, message):
    images = save_classes(tmp_path / "images")
    for old, new in zip("abcde", names, strict=False):
        (images / old).rename(images / f"new{new}")
    for path in list(images.iterdir()):
        if path.name.startswith("new"):
            path.rename(images / path.name[3:])
        elif not names and path.name == "a":
            for file in path.iterdir():
                file.rename(images / file.name)
            path.rmdir()
        else:
            shutil.rmtree(path)
    with pytest.raises(UsageError, match=f"--label_column label: {message}"):
        transform().check(folder_rows(str(images), "--train_data_dir"))


# Names


IMAGENET = dict(enumerate(["tench, Tinca tinca", "goldfish", "crane", "crane, lifting device", "Tusker"]))


def named(*names: str) -> datasets.Dataset:
    return rows_of([0] * 2, datasets.ClassLabel(names=list(names)))


GOOD_NAMES = {
    "the model's": list(IMAGENET.values()),
    "one synonym, another case, underscores": ["tinca_tinca", "Goldfish", "crane", "lifting device", "tusker"],
    "two classes of one name": ["tench", "goldfish", "crane", "Crane", "tusker"],
    "synset ids": ["n01440764", "n01443537", "n02012849", "n03126707", "n01871265"],
    "another language": ["Schleie", "Goldfisch", "Kranich", "Kran", "Elefant"],
    "the first of them alone": ["tench", "goldfish"],
}


@pytest.mark.parametrize("names", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_names_that_are_the_models_or_tell_nothing_are_taken(names):
    assert read_labels(named(*names), "label", CLASSES, IMAGENET) == [0, 0]


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["crane", "goldfish"],
            "label 0 is called crane there, which is class 2 of the model; its class 0 is tench",
        ),
        (["goldfish", "lifting device", "tench"], "label 0 is called goldfish there, which is class 1"),
        (["n0", "n1", "n2", "n3", "n4", "tench"], "label 5 is called tench there.* its class 5 is none"),
    ],
)
def test_names_in_another_order_are_refused(names, message):
    """As of a column whose numbers are others than the model's, or of folders in the order of the alphabet."""
    with pytest.raises(UsageError, match=f"--label_column label: {message}"):
        read_labels(named(*names), "label", CLASSES, IMAGENET)
    read_labels(named(*names), "label", CLASSES)  # of a model that has no names


def test_class_folders_in_the_order_of_the_alphabet_are_refused(tmp_path):
    images = save_classes(tmp_path / "images")
    for old, new in zip("abcde", ("tench", "goldfish", "crane", "lifting device", "tusker"), strict=True):
        (images / old).rename(images / new)
    with pytest.raises(UsageError, match="label 0 is called crane there, which is class 2"):
        read_labels(folder_rows(str(images), "--train_data_dir"), "label", CLASSES, IMAGENET)


def test_names_come_from_the_pipeline():
    assert class_names({"id2label": {"0": "tench", "10": "cock"}}) == {0: "tench", 10: "cock"}
    assert class_names({"id2label": None}) == class_names({}) == {}


def test_labels_of_a_parquet_file(tmp_path):
    """As datasets writes and reads them: the names come along."""
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    named("goldfish", "tench").to_parquet(file)
    again = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="label 0 is called goldfish there, which is class 1"):
        read_labels(again, "label", CLASSES, IMAGENET)
    assert read_labels(again, "label", CLASSES) == [0, 0]


def test_the_names_decide_nothing_of_a_cache():
    plain, told = (
        LabelTransform("image", 3, 32, True, False, label_column="label", num_classes=5, class_names=names)
        for names in (None, IMAGENET)
    )
    assert plain.settings() == told.settings() and plain.settings()["num_classes"] == 5
