# SPDX-License-Identifier: Apache-2.0
"""Kill training with SIGKILL at random moments, resume it, and compare with the run that was never killed.

    python benchmarks/faults.py --kills 20

Trains a small student of the bundled teacher for 12 steps with a checkpoint every 2. Every second kill strikes while a
checkpoint is being written, the others at a random moment after the first checkpoint. A kill is survived when the same
command with --resume_from_checkpoint latest ends well, and identical when the final weights, EMA and optimizer state
are the same bytes and the log the same lines.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--pretrained_model_name_or_path assets/teacher --dataset_name assets/fashion_mnist_16 --max_train_samples 64 "
    "--pruning_ratio 0.875 --student_init magnitude --max_train_steps 12 --train_batch_size 8 --random_flip --use_ema "
    "--gradient_accumulation_steps 2 --lambda_kd_feat 1 --checkpointing_steps 2 --logging_steps 3 "
    "--validation_shown_samples 1 --validation_num_inference_steps 1 --report_to none --num_cpu_threads 1"
).split()
STATE_FILES = ("student.safetensors", "ema.safetensors", "optimizer.safetensors")


def start(folder: Path, *more: str) -> subprocess.Popen:
    """train_place.py in a process of its own."""
    command = [sys.executable, "train_place.py", *FLAGS, "--output_dir", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def final_state(folder: Path) -> list[bytes]:
    """The bytes that a finished run is compared by."""
    last = folder / "checkpoints" / "step-0000012"
    return [(last / name).read_bytes() for name in STATE_FILES] + [(folder / "log.jsonl").read_bytes()]


def kill(process: subprocess.Popen, folder: Path, while_writing: bool, rng: random.Random) -> str:
    """SIGKILL at a chosen moment; says what the folder holds then."""
    checkpoints = folder / "checkpoints"
    while process.poll() is None and not any(checkpoints.glob("step-*")):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.5))
    while while_writing and process.poll() is None and not any(checkpoints.glob(".step-*.partial")):
        time.sleep(0.0002)
    if while_writing:
        time.sleep(rng.uniform(0, 0.01))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return ", ".join(sorted(path.name for path in checkpoints.iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--folder", type=Path, default=Path("faults"), help="scratch folder, emptied (default: faults)"
    )
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    folder, rng = args.folder.resolve(), random.Random(args.seed)
    _, errors = (reference := start(folder / "whole")).communicate()
    assert reference.returncode == 0, errors
    expected, survived, identical, halves = final_state(folder / "whole"), 0, 0, 0
    for number in range(args.kills):
        run = folder / f"killed-{number:02d}"
        held = kill(start(run), run, while_writing=number % 2 == 1, rng=rng)
        _, errors = (resumed := start(run, "--resume_from_checkpoint", "latest")).communicate()
        survived += resumed.returncode == 0
        same = resumed.returncode == 0 and final_state(run) == expected
        identical += same
        halves += ".partial" in held
        print(f"kill {number + 1}: {held} -> {'identical' if same else errors[-500:]}", flush=True)
        shutil.rmtree(run)
    print(f"{survived} of {args.kills} survived, {identical} identical; {halves} struck a checkpoint being written")
    shutil.rmtree(args.folder)
    raise SystemExit(identical != args.kills)


if __name__ == "__main__":
    main()
