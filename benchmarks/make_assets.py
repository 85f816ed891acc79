# SPDX-License-Identifier: Apache-2.0
"""Rebuild the bundled data set and the bundled feature extractor from the Fashion-MNIST originals.

    # Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere: --source, a folder with the four .gz files.
    python benchmarks/make_assets.py dataset                     # assets/fashion_mnist_16: 10,000 + 10,000 images
    python benchmarks/make_assets.py dataset --full some/folder  # all 60,000 training images + 10,000 test images
    python benchmarks/make_assets.py classifier                  # assets/classifier, trained on all 60,000
    python benchmarks/make_assets.py teacher --source teacher    # assets/teacher, from a run of train_lift.py
    python benchmarks/make_assets.py captions                    # the bundled images with captions, in my_captions

`dataset` writes the same bytes whenever it runs with the same versions of datasets, pyarrow and Pillow.
`classifier` is seeded, but float32 sums depend on the processor and on the torch version: on another machine expect
the accuracy again, not the same bytes.
"""

import argparse
import gzip
import io
import time
from collections.abc import Callable
from pathlib import Path

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED_TRAIN_IMAGES = 10_000  # 2 MB of parquet instead of 13: small enough to live in the git repository


def parse_args() -> argparse.Namespace:
    """Read the command line: `dataset` or `classifier`, each with --source and its own output folder."""
    originals = argparse.ArgumentParser(add_help=False)
    originals.add_argument(
        "--source",
        type=Path,
        default=Path(DEBIAN_FOLDER),
        help="folder with train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz (default: where the Debian package dataset-fashion-mnist installs them, "
        f"{DEBIAN_FOLDER})",
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    dataset = commands.add_parser(
        "dataset", parents=[originals], help="write the images as parquet, with a card and the licence (seconds)"
    )
    where = dataset.add_mutually_exclusive_group()
    where.add_argument(
        "--output",
        type=Path,
        default=ASSETS / "fashion_mnist_16",
        help=f"folder to write, with the first {BUNDLED_TRAIN_IMAGES:,} of train: 4.6 MB (default: %(default)s)",
    )
    where.add_argument(
        "--full",
        type=Path,
        metavar="DIR",
        help="write DIR instead, with all 60,000 training images: 16 MB, to train a teacher on more than the bundle",
    )

    classifier = commands.add_parser(
        "classifier",
        parents=[originals],
        help="train the bundled feature extractor on all 60,000 images (one CPU core, about five minutes)",
    )
    classifier.add_argument(
        "--output",
        type=Path,
        default=ASSETS / "classifier",
        help="transformers model directory to write: 0.7 MB (default: %(default)s)",
    )
    teacher = commands.add_parser("teacher", help="round a trained pipeline to float16 for the bundle (seconds)")
    teacher.add_argument("--source", type=Path, required=True, help="the --output_dir of train_lift.py")
    teacher.add_argument(
        "--output",
        type=Path,
        default=ASSETS / "teacher",
        help="folder to write: 5.2 MB (default: %(default)s)",
    )
    captions = commands.add_parser(
        "captions", help="give the bundled images the captions that assets/flow_teacher was told (seconds)"
    )
    captions.add_argument(
        "--output", type=Path, default=Path("my_captions"), help="folder to write, parquet (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = parse_args()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# The classifier. Small enough for git and for one CPU core; see classifier_config for the shape.
EPOCHS = 8  # passes over the 60,000 images, about half a minute each
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 4e-3  # AdamW, one cycle
SEED = 0

MIT_LICENSE = """\
The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of
this software and associated documentation files (the "Software"), to deal in
the Software without restriction, including without limitation the rights to
use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
the Software, and to permit persons to whom the Software is furnished to do so,
subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS
FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

DATASET_CARD = """\
---
license: mit
pretty_name: Fashion-MNIST at 16x16
task_categories:
- image-classification
- unconditional-image-generation
source_datasets:
- extended|zalando-datasets/fashion_mnist
size_categories:
- 10K<n<100K
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
---

# Fashion-MNIST at 16x16

Fashion-MNIST (Zalando SE, 2017), made small enough to train a diffusion model on a CPU in minutes.

| split | rows | which originals |
|---|---|---|
| train | {train_rows:,} | {which_train} |
| test | 10,000 | all test images, in the original order |

## What was done to the images

1. Each 28x28 image is padded with two rows or columns of black (0) on every side: 32x32.
2. Each 2x2 block is replaced by its mean, rounded to the nearest integer, halves up, `(a + b + c + d + 2) // 4`:
   16x16.
3. The result is stored as a grayscale PNG (mode L), black background, values 0 to 255.

Labels are the originals. Nothing was removed, reordered or augmented. `benchmarks/make_assets.py dataset` rebuilds the
files.

```python
from datasets import load_dataset

row = load_dataset("{folder}", split="train")[0]  # {{"image": 16x16 PIL image of mode L, "label": 9}}
```

## Licence

MIT, Copyright (c) 2017 Zalando SE; the notice is in `LICENSE`.
Source: <https://github.com/zalandoresearch/fashion-mnist>; Han Xiao, Kashif Rasul, Roland Vollgraf: "Fashion-MNIST:
a Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv:1708.07747.
"""

CLASSIFIER_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---

# A small classifier of 16x16 Fashion-MNIST

The feature extractor of the bundled validation: a ResNet of 64 features, {accuracy:.2%} accuracy on the 10,000 test
images (last epoch, no epoch chosen on them).
Trained on the 60,000 training images shrunk to 16x16 as `../fashion_mnist_16/README.md` describes, gray repeated to
RGB, {epochs} epochs, mirrored at random, seed 0. Rebuild: `python benchmarks/make_assets.py classifier`.

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("assets/classifier")
processor = AutoImageProcessor.from_pretrained("assets/classifier")
```

A Frechet distance over these features compares models trained on these images with each other. It is not FID, and no
number of it can be set beside a published FID.
"""


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes, (rows,) or (rows, height, width), uint8.

    Raises ValueError when the file is absent or is not what its header says.
    """
    if not path.is_file():
        raise ValueError(
            f"--source: {path} does not exist. Install the Debian package dataset-fashion-mnist, or download the four "
            ".gz files from https://github.com/zalandoresearch/fashion-mnist and pass their folder."
        )
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":  # two zero bytes, then 8 = unsigned byte; the fourth is the number of dimensions
        raise ValueError(f"--source: {path} is not an idx file of unsigned bytes.")
    dims = data[3]
    shape = np.frombuffer(data, ">u4", count=dims, offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if values.size != shape.prod():
        raise ValueError(f"--source: {path} holds {values.size} values, its header says {shape.tolist()}.")
    return values.reshape(shape)


def read_split(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 16, 16) uint8 and labels (N,) uint8 of "train" or "test", in the original order."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    return shrink(images), labels


def shrink(images: np.ndarray) -> np.ndarray:
    """(N, 28, 28) uint8 -> (N, 16, 16) uint8: pad to 32x32 with black, then the rounded mean of each 2x2 block."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint16)
    sums = padded.reshape(len(images), 16, 2, 16, 2).sum(axis=(2, 4))
    return ((sums + 2) // 4).astype(np.uint8)  # integers round the same everywhere


def write_parquet(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write images (N, H, W) uint8 and labels (N,) as one parquet file with Hub features, images as grayscale PNG."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()

    features = Features({"image": Image(), "label": ClassLabel(names=list(LABELS))})
    rows = {"image": [{"bytes": png(image), "path": None} for image in images], "label": labels.astype(np.int64)}
    Dataset.from_dict(rows, features=features).to_parquet(path)


def make_dataset(source: Path, folder: Path, train_images: int | None) -> None:
    """Write both splits, the card and the licence to `folder`; of train the first `train_images` rows (None: all)."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, keep in (("train", train_images), ("test", None)):
        images, labels = read_split(source, split)
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(images[:keep], labels[:keep], path)
        print(f"{path}: {len(images[:keep]):,} images, {path.stat().st_size:,} bytes")

    names = "\n".join(f"          '{index}': {name}" for index, name in enumerate(LABELS))
    which = "all training images" if train_images is None else f"the first {train_images:,} training images"
    card = DATASET_CARD.format(
        names=names,
        train_rows=60_000 if train_images is None else train_images,
        which_train=f"{which}, in the original order",
        folder="assets/fashion_mnist_16" if train_images else "path/to/this/folder",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "LICENSE").write_text(MIT_LICENSE, encoding="utf-8")


def make_classifier(source: Path, folder: Path) -> None:
    """Train on all 60,000 images at 16x16, and write a transformers model directory with its processor and card."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of float sums depends on the number of threads
    config = ResNetConfig(
        num_channels=3,  # as pipelines return RGB, and as other feature extractors expect
        embedding_size=32,
        hidden_sizes=[32, 64],  # 64 features: 5,000 images estimate their 64x64 covariance well
        depths=[2, 2],
        layer_type="basic",
        hidden_act="gelu",  # relu leaves features that are zero for every image, and so a singular covariance
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
    # ResNet's stem divides each side by four: enlarged to 32x32 the last stage still sees 4x4 positions.
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    model = ResNetForImageClassification(config).to(memory_format=torch.channels_last)

    images, labels = (torch.from_numpy(array.copy()) for array in read_split(source, "train"))
    images = images[:, None].repeat(1, 3, 1, 1)  # (60000, 3, 16, 16) uint8
    labels = labels.long()

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=PEAK_LEARNING_RATE
    )
    steps_per_epoch = len(images) // BATCH_SIZE
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, EPOCHS * steps_per_epoch)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    start = time.time()
    for epoch in range(EPOCHS):
        model.train()
        order, total = torch.randperm(len(images)), 0.0
        for step in range(steps_per_epoch):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            batch = images[rows]
            mirrored = torch.rand(len(rows)) < 0.5  # clothes stay clothes in a mirror; nothing else is augmented
            batch[mirrored] = batch[mirrored].flip(-1)
            pixels = processor(batch, return_tensors="pt", disable_grouping=False).pixel_values  # one resize a batch
            logits = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last)).logits
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item()
        accuracy = test_accuracy(model, processor, source)
        print(
            f"epoch {epoch + 1}/{EPOCHS}: loss {total / steps_per_epoch:.4f}, test accuracy {accuracy:.2%}, "
            f"{time.time() - start:.0f} s",
            flush=True,
        )

    # The last epoch is kept whatever its accuracy: the best of eight would be chosen on the test images.
    model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, unreadable for another user of a checkout
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(CLASSIFIER_CARD.format(epochs=EPOCHS, accuracy=accuracy), encoding="utf-8")
    print(f"{folder}: {(folder / 'model.safetensors').stat().st_size:,} bytes of weights")


@torch.inference_mode()
def test_accuracy(model: torch.nn.Module, processor: Callable, source: Path) -> float:
    """Share of the 10,000 test images that the model labels correctly, 0 to 1."""
    model.eval()
    images, labels = (torch.from_numpy(array.copy()) for array in read_split(source, "test"))
    images = images[:, None].repeat(1, 3, 1, 1)
    correct = 0
    for rows in torch.arange(len(images)).split(500):
        logits = model(**processor(images[rows], return_tensors="pt", disable_grouping=False)).logits
        correct += (logits.argmax(1) == labels[rows]).sum().item()
    return correct / len(images)


def make_teacher(source: Path, output: Path) -> None:
    """Save the pipeline in `source` with float16 weights."""
    from diffusers import DDPMPipeline

    DDPMPipeline.from_pretrained(source, dtype=torch.float16).save_pretrained(output)


def main(args: argparse.Namespace) -> None:
    """Build what the command line asks for."""
    if args.command == "teacher":
        make_teacher(args.source, args.output)
    elif args.command == "captions":
        from latent_teachers import make_captioned

        make_captioned(args.output)
        print(f"{args.output}: column `text`, {BUNDLED_TRAIN_IMAGES:,} images in `train`, 10,000 in `test`")
    elif args.command == "classifier":
        make_classifier(args.source, args.output)
    elif args.full is not None:
        make_dataset(args.source, args.full, train_images=None)
    else:
        make_dataset(args.source, args.output, train_images=BUNDLED_TRAIN_IMAGES)


if __name__ == "__main__":
    main(ARGS)
