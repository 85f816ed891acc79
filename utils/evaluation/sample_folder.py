# SPDX-License-Identifier: Apache-2.0
"""Samples on disk, written so that a stopped run goes on with what is missing."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from utils.command_line import UsageError
from utils.evaluation.parallel import blocks
from utils.files import read_json, write_json, written_beside
from utils.publishing.html_report import NAME

OTHER = "compare_to"  # in --output_dir: the folder of the second pipeline's samples


def clear_evaluation(output_dir: str) -> None:
    """Delete what an earlier evaluation left in `output_dir`, and nothing else.

    Raises:
        UsageError: files of its names are there that no evaluation has made.
    """
    folder = Path(output_dir)
    sampled, measured = (folder / "sampling" / "protocol.json").is_file(), _is_report(folder / "metrics.json")
    ours = {
        "images": sampled,
        "sampling": sampled,
        OTHER: sampled,
        "metrics.json": measured,
        "samples.png": sampled or measured,
        NAME: measured,
    }
    present = {folder / name: is_ours for name, is_ours in ours.items() if (folder / name).exists()}
    if foreign := [str(path) for path, is_ours in present.items() if not is_ours]:
        raise UsageError(
            f"--overwrite_output_dir would delete {', '.join(foreign)}, which no evaluation has made. Choose another "
            "--output_dir, or delete it yourself."
        )
    for path in present:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_report(path: Path) -> bool:
    content = read_json(path)
    return isinstance(content, dict) and {"metrics", "protocol"} <= set(content)


class SampleFolder:
    """Samples as PNG files, block by block. A block is complete when its record is there, written after its images.

    `images/000000.png` and so on; `sampling/protocol.json`, what the samples depend on; `sampling/block-000000.json`,
    the number of images in a block and what they cost.
    """

    def __init__(self, output_dir: str, num_samples: int, batch_size: int):
        self.images, self.records = Path(output_dir) / "images", Path(output_dir) / "sampling"
        self.num_samples = num_samples
        self.blocks = blocks(num_samples, batch_size)

    def open(self, protocol: dict) -> int:
        """Begin, or go on; how many samples are there already. For the main process alone.

        Raises:
            UsageError: the folder holds samples of another protocol; names what differs.
        """
        file = self.records / "protocol.json"
        protocol = json.loads(json.dumps(protocol, default=str))
        if found := read_json(file):
            changed = [key for key in {**protocol, **found} if protocol.get(key) != found.get(key)]
            if changed:
                shown = "; ".join(f"{key}: {_short(found.get(key))} -> {_short(protocol.get(key))}" for key in changed)
                raise UsageError(
                    f"--output_dir {self.records.parent} holds samples that were made otherwise ({shown}). Choose "
                    "another folder, or start anew in this one with --overwrite_output_dir."
                )
        self.images.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(exist_ok=True)
        write_json(file, protocol)
        for leftover in (*self.images.glob(".*.png"), *self.records.glob(".*.json")):  # of a process that was killed
            leftover.unlink()
        return self.num_samples - sum(len(block) for block in self.missing())

    def missing(self) -> list[range]:
        """The blocks that are not, or not wholly, there. A sample's last bits depend on the size of its block, so one
        of another size is made again."""
        return [block for block in self.blocks if not self._is_complete(block)]

    def _is_complete(self, block: range) -> bool:
        record = read_json(self._record(block)) or {}
        return record.get("images") == len(block) and all(path.exists() for path in self.paths(block))

    def write(self, block: range, images: torch.Tensor, record: dict) -> None:
        """Write the uint8 images (B, C, H, W) of `block`, then its record."""
        self._record(block).unlink(missing_ok=True)  # of another size
        for path, image in zip(self.paths(block), images, strict=True):
            array = image.permute(1, 2, 0).numpy()
            with written_beside(path) as beside:
                Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(beside, "PNG", compress_level=1)
        write_json(self._record(block), {"images": len(block), **record})

    def paths(self, indices: range | None = None) -> list[Path]:
        """The files of `indices`, by default of all samples."""
        return [self.images / f"{index:06d}.png" for index in indices or range(self.num_samples)]

    def block_records(self) -> list[dict]:
        """What was recorded of every block."""
        return [json.loads(self._record(block).read_text()) for block in self.blocks]

    def _record(self, block: range) -> Path:
        return self.records / f"block-{block.start:06d}.json"


def _short(value) -> str:
    return text if len(text := json.dumps(value)) <= 60 else text[:57] + "..."
