# SPDX-License-Identifier: Apache-2.0
"""The command line that make_text_teacher.py, make_dit_teacher.py and make_flow_teacher.py share, read before they
import what takes seconds."""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from utils.command_line import UsageError, start  # noqa: E402

BATCH, VAE_BATCH = 64, 32  # images a step
VAE_STEPS = 2000
SEED = 0


class Teacher(NamedTuple):
    """What a script makes, in a folder of this name, and the defaults of its flags."""

    name: str
    steps: int
    learning_rate: float
    guidance: float


def read(description: str, teacher: Teacher) -> argparse.Namespace:
    """The command line, with what it makes as `teacher`; --help and wrong flags end here, as does a folder that holds
    what is to be trained, or not what is to be measured."""
    return start(parse_args, description, teacher)


def parse_args(description: str, teacher: Teacher) -> argparse.Namespace:
    """The command line, checked. Raises UsageError."""
    name, steps, rate, guidance = teacher
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help=f"of all teachers: vae, data and {name} are made in it where they are not there"
    )
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of {BATCH} images ({steps})")
    parser.add_argument("--init_from", type=Path, help="an earlier teacher whose denoiser is trained on, with its VAE")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of its batches and noise (default: {SEED})")
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS, help=f"of {VAE_BATCH} images ({VAE_STEPS})")
    parser.add_argument("--learning_rate", type=float, default=rate, help=f"its peak (default: {rate})")
    parser.add_argument("--measure", action="store_true", help="measure the trained teacher instead, numbers to JSON")
    parser.add_argument("--samples", type=int, default=1000, help="of --measure (default: 1000)")
    parser.add_argument("--inference_steps", type=int, default=25, help="of --measure (default: 25)")
    parser.add_argument("--guidance", type=float, default=guidance, help=f"of --measure (default: {guidance})")
    args = parser.parse_args()
    args.target = args.folder / name
    trained = (args.target / "model_index.json").exists()
    if trained and not args.measure:
        raise UsageError(f"{args.target} is trained. Give --measure, or another folder.")
    if args.measure and not trained:
        raise UsageError(f"--measure: {args.target} holds no trained teacher. Run this without --measure first.")
    return args
