# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/study.py does for every row: run a script apart from it, measure what it made, keep the numbers."""

import fcntl
import json
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from recorded import cpu_name, record_teacher
from study_rows import COMMON, Family
from torchvision.transforms.functional import pil_to_tensor

import evaluate_fid
import train_lift
import train_place
from utils.command_line import UsageError, call
from utils.files import read_json, versions, write_file
from utils.metrics.extractors import load_extractor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "study"
STEPS = 25  # of the sampler
SCRIPTS = {"train_lift.py": train_lift, "train_place.py": train_place}


def apart(name: str, log: Path, job: Callable, *arguments) -> float:
    """`job(*arguments)` in a fork of this process, which has everything imported, its output in `log`; CPU seconds.

    Raises:
        RuntimeError: it failed; the message ends with what it printed.
    """

    def child() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        job(*arguments)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{name}: exit code {process.exitcode}, see {log}:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Results:
    """A JSON file of records, one a line, each known by its `keys`. Rows of a setting and seed are of one machine,
    whatever stage they are of: a figure on another processor differs by more than the methods do."""

    def __init__(self, name: str, *keys: str):
        self.path, self.keys = RESULTS / f"{name}.json", keys
        self.records: list[dict] = read_json(self.path) or []

    def find(self, **key) -> dict | None:
        """The record whose `keys` are these."""
        return next((record for record in self.records if all(record[name] == key[name] for name in self.keys)), None)

    def add(self, record: dict) -> None:
        """Keep a record and write the file."""
        self.path.parent.mkdir(exist_ok=True)
        lock = os.open(self.path.parent, os.O_RDONLY)  # two settings or seeds may run side by side
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.records = [*(read_json(self.path) or []), {**record, **machine()}]
            lines = ",\n".join(json.dumps(each) for each in self.records)
            write_file(self.path, f"[\n{lines}\n]\n")
        finally:
            os.close(lock)

    def check_machine(self, setting: str, seed: int) -> None:
        """Raises UsageError where rows of this setting and seed were run on another processor."""
        for path in {self.path, *RESULTS.glob("stage_*.json")}:
            for record in read_json(path) or []:
                if (record.get("setting"), record.get("seed")) == (setting, seed) and record["cpu"] != cpu_name():
                    raise UsageError(
                        f"--settings {setting} --seeds {seed}: {path.name} has rows of these from {record['cpu']}, "
                        f"this is {cpu_name()}. Processors differ by more than methods do: finish them there, or take "
                        "another seed."
                    )


def machine() -> dict:
    """What a number depends on besides its command."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS.relative_to(ROOT)}")
    packages = versions("torch", "diffusers", "accelerate", "transformers", "numpy")
    return {
        "commit": git("describe", "--always") + ("-dirty" if changed else ""),
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version(), **packages},
    }


def train(folder: Path, script: str, flags: list[str], record: Path | None) -> float:
    """Run a script on `flags` into `folder`; CPU seconds."""
    folder.mkdir(parents=True, exist_ok=True)

    def job() -> None:
        if record:
            record_teacher(record)
        call(SCRIPTS[script], [*COMMON, *flags, "--output_dir", str(folder / "student")])

    log = folder / "train.txt"
    log.unlink(missing_ok=True)
    return apart(f"{script} {shlex.join(flags)}", log, job)


def evaluate(folder: Path, what: list[str], samples: int, reference: list[str], metrics: str, work: Path) -> tuple:
    """(metrics, CPU seconds) of `samples` samples."""
    flags = [*what, "--num_samples", str(samples), *reference, "--metrics", *metrics.split(), "--num_cpu_threads", "1"]
    flags += [
        "--feature_extractor",
        str(ROOT / "assets" / "classifier"),
        "--reference_cache_dir",
        str(work / "reference"),
    ]
    flags += ["--output_dir", str(folder / "evaluation"), "--overwrite_output_dir"]
    seconds = apart("evaluate_fid.py", folder / "evaluation.txt", call, evaluate_fid, flags)
    return read_json(folder / "evaluation" / "metrics.json")["metrics"], seconds


def sampled(pipeline: str, family: Family) -> list[str]:
    """Flags of evaluate_fid.py."""
    flags = ["--pretrained_model_name_or_path", pipeline, "--num_inference_steps", str(STEPS)]
    for name in ("scheduler", "guidance_scale", "prompts", "max_sequence_length"):
        if value := getattr(family, name):
            flags += [f"--{name}", str(value)]
    if family.class_labels:
        flags += ["--class_labels", *map(str, family.class_labels)]
    return [*flags, "--keep_images"] if family.asks else flags


def as_asked(folder: Path) -> float:
    """The share of the samples of `evaluate` that assets/classifier takes for the class they are of, all ten in turn;
    the images are deleted."""
    extractor = load_extractor(str(ROOT / "assets" / "classifier"), with_probabilities=True)
    images = folder / "evaluation" / "images"
    files, right = sorted(images.glob("*.png")), 0
    for first in range(0, len(files), 500):
        part = torch.stack([pil_to_tensor(Image.open(file)) for file in files[first : first + 500]])
        _, probabilities = extractor.features_and_probabilities(part)
        wanted = torch.arange(first, first + len(part)) % probabilities.shape[1]
        right += (probabilities.argmax(1).cpu() == wanted).sum().item()
    shutil.rmtree(images)
    return right / len(files)
