# SPDX-License-Identifier: Apache-2.0
"""The command line of analyze_error.py, in groups. What contradicts itself is refused here."""

import argparse
from collections.abc import Sequence

from utils.command_line import ArgumentParser, UsageError, bundled, warn_of_idle_flags
from utils.download_cache import use_download_cache
from utils.flags import (
    add_shared,
    check_background,
    check_crop,
    check_data,
    check_group_size,
    check_not_negative,
    check_output_folder,
    check_positive,
    read_prompts_file,
)
from utils.output_dir import check_output_dir

PROBES = {  # name -> what the lines of "corrected" are
    "student_input": "fitted in every step where the corrected student is, as the authors' DiT code does",
    "teacher_trajectory": "fitted along the teacher's own trajectory, as the authors' DDPM code does",
}
RENAMED = {
    "--validation_split": "--split",
    "--validation_num_samples": "--num_samples (and the images seen at every place of the schedule are --num_images)",
    "--validation_images": "--shown_samples",
    "--validation_prompts": "--prompts FILE, one prompt a line",
    "--validation_guidance_scale": "--guidance_scale",
    "--validation_guidance_channels": "--guidance_channels",
}
HOW_TO_READ = """\
How to read it
  coarse share  what lines remove of the squared error: one line per image and channel, or one per PLACE group. High:
                mean and scale are off, which is easy to learn. Low: the rest needs capacity, features or training.
                Of an error without structure, independent from element to element, a line through K elements
                removes 2 / K on average: the last row, chance.
  slope         above 1 the student's predictions are too weak, below 1 too strong; intercept: their mean is off, in
                units of the prediction (noise has a standard deviation of 1). line.png shows the spread over images.
  corrected     the student sampled with every prediction moved along a line to the teacher's. A probe, no sampler:
                it runs the teacher at every step. The gap that it closes between student and teacher is what the
                coarse part cost; what still differs is the fine part. Its lines are those of --probe."""


def parse_args(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Raises UsageError naming the flag, what was found and what to do."""
    parser = ArgumentParser(description=description, epilog=HOW_TO_READ, renamed=RENAMED)
    group = parser.add_argument_group("teacher and student")
    add_shared(group, "pretrained_model_name_or_path")
    group.add_argument(
        "--student_model_name_or_path",
        type=bundled,
        help="the student: its pipeline's folder, or its U-Net's alone, of "
        "which the schedule it was trained on cannot be checked",
    )
    add_shared(group, "revision variant pretrained_vae_model_name_or_path allow_pickle_weights cache_dir")

    group = parser.add_argument_group("data")
    add_shared(
        group,
        "dataset_name dataset_config_name train_data_dir split image_column caption_column label_column resolution "
        "crop image_interpolation_mode background skip_bad_images",
    )

    group = parser.add_argument_group("error")
    group.add_argument(
        "--num_timesteps",
        type=int,
        default=20,
        help="timesteps, of a flow places, the midpoints of as many equal stretches of the schedule (default: 20)",
    )
    group.add_argument(
        "--num_images", type=int, default=256, help="images, each seen at every one of them (default: 256)"
    )
    add_shared(group, "group_size")

    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=int, default=50, help="sampler steps (default: 50)")
    group.add_argument(
        "--guidance_scale",
        type=float,
        help="classifier-free guidance, 0 for none (default: the stock pipeline's own; none where "
        "the teacher's scheduler is as a turbo model's, LCM's or TCD's; give 0 for a distilled flow)",
    )
    group.add_argument(
        "--probe",
        choices=PROBES,
        default="student_input",
        help="the lines of the corrected student: student_input (default), fitted in every step at its own input; or "
        "teacher_trajectory, fitted along the teacher's trajectory from the same noise, as the authors' DDPM code",
    )
    add_shared(
        group,
        "guidance_channels prompts max_sequence_length feature_extractor inception_path",
        prompts={
            "help": "text file, one prompt a line; sample i has the i-th, over and over. Default: captions of the "
            "data, with an extractor as many as there are samples"
        },
        feature_extractor={
            "help": "inception, or a transformers image model, folder or Hub id; measures the Frechet distance from "
            "the whole split to samples of student, corrected student and teacher. Default: none is measured"
        },
    )
    group.add_argument(
        "--num_samples", type=int, default=2048, help="samples of each for that distance (default: 2048)"
    )
    group.add_argument("--shown_samples", type=int, default=8, help="columns of samples.png (default: 8)")

    group = parser.add_argument_group("run and output")
    add_shared(
        group,
        "output_dir overwrite_output_dir",
        output_dir={"default": "analysis", "help": "for analysis.json and figures (default: analysis)"},
        overwrite_output_dir={"help": "replace an analysis that is there"},
    )
    group.add_argument("--batch_size", type=int, default=128, help="images at once (default: 128)")
    add_shared(
        group,
        "seed num_cpu_threads",
        seed={"help": "images, noise and samples follow from it (default: 0)"},
        num_cpu_threads={"help": "threads on the CPU; default: one for each core"},
    )
    args = parser.parse_args(argv)
    with parser.placed_errors():
        _check(args)
    use_download_cache(args.cache_dir)
    idle = [
        ("inception_path", args.feature_extractor != "inception", "--feature_extractor inception"),
        ("num_samples", not args.feature_extractor, "--feature_extractor, which measures a distance"),
        ("dataset_config_name", bool(args.train_data_dir), "--dataset_name"),
    ]
    warn_of_idle_flags(args, parser, idle)
    return args


def for_backbone(args: argparse.Namespace) -> argparse.Namespace:
    """The training scripts' flags that a backbone reads: off, but for what this script has, under its names."""
    from utils.backbones.base import FAMILY_FLAGS  # with torch, for which --help need not wait

    off = dict.fromkeys(("student_config", "dropout", "taylor_timesteps"))
    off |= {"random_flip": False, "lambda_task": 1.0}
    own = {
        "validation_prompts": read_prompts_file(args.prompts) if args.prompts else None,
        "validation_guidance_scale": args.guidance_scale,
        "validation_guidance_channels": args.guidance_channels,
        "validation_shown_samples": args.shown_samples,
        "center_crop": True,
    }
    called = {"validation_prompts": "prompts"}
    called |= {f"validation_{name}": name for name in ("guidance_scale", "guidance_channels")}
    return argparse.Namespace(**{**FAMILY_FLAGS, **off, **vars(args), **own, "called": called})


def _check(args: argparse.Namespace) -> None:
    for flag, what in (("pretrained_model_name_or_path", "teacher"), ("student_model_name_or_path", "student")):
        if not getattr(args, flag):
            raise UsageError(f"--{flag} is missing: name the {what}'s folder. The error is between the two.")
    check_data(args)
    check_background(args)
    check_crop(args)
    if args.dataset_name:
        args.split = args.split or "train"
    check_positive(
        args,
        "resolution max_sequence_length num_timesteps num_images num_inference_steps shown_samples num_samples "
        "batch_size num_cpu_threads",
    )
    check_not_negative(args, "seed guidance_scale")
    check_group_size(args)
    if args.feature_extractor and args.num_samples < max(2, args.shown_samples):
        raise UsageError(
            f"--num_samples is {args.num_samples}; a distance needs at least 2 samples, and the first --shown_samples "
            f"{args.shown_samples} of them are shown."
        )
    check_output_folder(
        args,
        "is not empty. Choose another folder, or replace the analysis in it with --overwrite_output_dir.",
        unless=args.overwrite_output_dir,
    )
    check_output_dir(args.output_dir)
