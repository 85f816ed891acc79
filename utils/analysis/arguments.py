# SPDX-License-Identifier: Apache-2.0
"""The command line of analyze_error.py, in groups. What contradicts itself is refused here."""

import argparse
import warnings
from pathlib import Path

from utils.command_line import ArgumentParser
from utils.output_dir import check_output_dir

HOW_TO_READ = """\
How to read it
  coarse share  what lines remove of the squared error: one line per image and channel, or one per PLACE group. High:
                mean and scale are off, which is easy to learn. Low: the rest needs capacity, features or training.
                Of an error without structure, independent from element to element, a line through K elements
                removes 2 / K on average: the last row, chance.
  slope         above 1 the student's predictions are too weak, below 1 too strong; intercept: their mean is off, in
                units of the prediction (noise has a standard deviation of 1). line.png shows the spread over images.
  corrected     the student sampled with every prediction moved along its line to the teacher's. A probe, no sampler:
                it runs the teacher at every step. The gap that it closes between student and teacher is what the
                coarse part cost; what still differs is the fine part."""


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError naming the flag, what was found and what to do."""
    parser = ArgumentParser(description=description, epilog=HOW_TO_READ)
    group = parser.add_argument_group("teacher and student")
    group.add_argument("--pretrained_model_name_or_path", help="the teacher: a diffusers pipeline folder or Hub id")
    group.add_argument(
        "--student_model_name_or_path",
        help="the student: its pipeline's folder, or its U-Net's alone, of "
        "which the schedule it was trained on cannot be checked",
    )
    group.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    group.add_argument("--variant", help="weight file variant of the teacher, such as fp16")
    group.add_argument("--pretrained_vae_model_name_or_path", help="another VAE of the same latent space")
    group.add_argument(
        "--allow_pickle_weights", action="store_true", help="load a teacher whose weights are .bin files"
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="a dataset on the Hub, or a local folder in its layout (parquet)")
    group.add_argument("--dataset_config_name", help="the dataset's configuration, where it has several")
    group.add_argument("--train_data_dir", help="or: a folder of image files, read as `imagefolder`")
    group.add_argument("--validation_split", default="train", help="split to take images from (default: train)")
    group.add_argument("--image_column", default="image", help="column of the images (default: image)")
    group.add_argument("--resolution", type=int, help="pixels a side; default: the teacher's sample_size")
    group.add_argument("--skip_bad_images", action="store_true", help="put the next good row where one is damaged")
    group.add_argument("--caption_column", help="column of the captions of a text-to-image teacher (default: text)")

    group = parser.add_argument_group("error")
    group.add_argument(
        "--num_timesteps",
        type=int,
        default=20,
        help="timesteps, the midpoints of as many equal stretches of the schedule (default: 20)",
    )
    group.add_argument(
        "--num_samples", type=int, default=256, help="images, each seen at every timestep (default: 256)"
    )
    group.add_argument(
        "--group_size",
        type=int,
        default=16,
        help="elements of a PLACE group, from 2 to those of a channel (default: 16, the paper's)",
    )

    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=int, default=50, help="sampler steps (default: 50)")
    group.add_argument("--validation_images", type=int, default=8, help="columns of samples.png (default: 8)")
    group.add_argument(
        "--validation_prompts",
        nargs="+",
        help="of the samples; default: captions of the data, with an extractor as many as there are samples",
    )
    group.add_argument("--validation_guidance_scale", type=float, help="classifier-free guidance (default: 7.5)")
    group.add_argument(
        "--feature_extractor",
        help="inception, or a transformers image model, folder or Hub id; measures the Frechet distance from the "
        "whole split to samples of student, corrected student and teacher. Default: none is measured",
    )
    group.add_argument("--inception_path", help="folder of Inception's weights, where they cannot be downloaded")
    group.add_argument(
        "--validation_num_samples", type=int, default=2048, help="samples of each for that distance (default: 2048)"
    )

    group = parser.add_argument_group("run and output")
    group.add_argument("--output_dir", default="analysis", help="for analysis.json and figures (default: analysis)")
    group.add_argument("--overwrite_output_dir", action="store_true", help="replace an analysis that is there")
    group.add_argument("--batch_size", type=int, default=128, help="images at once (default: 128)")
    group.add_argument("--seed", type=int, default=0, help="images, noise and samples follow from it (default: 0)")
    group.add_argument("--num_cpu_threads", type=int, help="threads on the CPU; default: one for each core")
    parser.set_defaults(  # what a backbone asks of training and is settled here
        pruning_ratio=None,
        student_config=None,
        center_crop=True,
        random_flip=False,
        max_train_samples=None,
        snr_gamma=None,
        student_preset=None,
        lora_rank=None,
        cache_dir=None,
        cache_variants=None,
        noise_offset=0.0,
        proportion_empty_prompts=0.0,
    )
    args = parser.parse_args(argv)
    _check(args)
    for flag, reason in (
        ("inception_path", args.feature_extractor != "inception" and "it goes with --feature_extractor inception"),
        (
            "validation_num_samples",
            not args.feature_extractor and "without --feature_extractor no distance is measured",
        ),
        ("dataset_config_name", args.train_data_dir and "a --train_data_dir has no configurations"),
    ):
        if reason and getattr(args, flag) != parser.get_default(flag):
            warnings.warn(f"--{flag} has no effect: {reason}.", stacklevel=2)
    return args


def _check(args: argparse.Namespace) -> None:
    for flag, what in (("pretrained_model_name_or_path", "teacher"), ("student_model_name_or_path", "student")):
        if not getattr(args, flag):
            raise ValueError(f"--{flag} is missing: name the {what}'s folder. The error is between the two.")
    if bool(args.dataset_name) == bool(args.train_data_dir):
        found = "both" if args.dataset_name else "neither"
        raise ValueError(f"Give one of --dataset_name and --train_data_dir; found {found}.")
    for name in (
        "resolution num_timesteps num_samples num_inference_steps validation_images validation_num_samples batch_size "
        "num_cpu_threads"
    ).split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be above 0.")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must not be negative.")
    if args.group_size < 2:
        raise ValueError(f"--group_size is {args.group_size}; a line needs at least 2 elements, the paper has 16.")
    if args.feature_extractor and args.validation_num_samples < max(2, args.validation_images):
        raise ValueError(
            f"--validation_num_samples is {args.validation_num_samples}; a distance needs at least 2 samples, and the "
            f"first --validation_images {args.validation_images} of them are shown."
        )
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {folder} is not empty. Choose another folder, or replace the analysis in it with "
            "--overwrite_output_dir."
        )
    check_output_dir(args.output_dir)
