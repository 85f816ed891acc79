# SPDX-License-Identifier: Apache-2.0
"""The command line of evaluate_fid.py, in groups. What contradicts itself is refused here."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from utils.command_line import ArgumentParser, Switch, UsageError, bundled, warn_of_idle_flags
from utils.download_cache import use_download_cache
from utils.flags import (
    add_shared,
    check_background,
    check_crop,
    check_not_negative,
    check_output_folder,
    check_positive,
    read_prompts_file,
)

PR_NEIGHBOURS = 5  # k of precision and recall, the paper's
METRICS = {"fid": 2, "kid": 2, "pr": PR_NEIGHBOURS + 1, "is": 10, "clip": 2}  # -> the least samples; IS has 10 splits
RENAMED = {"--prompt_column": "--caption_column"}
REFERENCES = ("dataset_name", "train_data_dir", "reference_images", "reference_stats", "cleanfid_stats")


def parse_args(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        UsageError: an unknown or misspelt flag, a value out of range, or flags that contradict each other.
    """
    parser = ArgumentParser(description=description, renamed=RENAMED)
    for add_group in (_samples, _sampling, _reference, _metrics, _cost, _output, _speed):
        add_group(parser)
    args = parser.parse_args(argv)
    with parser.placed_errors():
        _check(args)
    use_download_cache(args.cache_dir)
    warn_of_idle_flags(args, parser, _idle_flags(args))
    return args


def _samples(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    add_shared(
        group,
        "pretrained_model_name_or_path revision variant allow_pickle_weights cache_dir",
        pretrained_model_name_or_path={"help": "any diffusers pipeline, folder or Hub id; samples are drawn from it"},
    )
    group.add_argument(
        "--images",
        type=bundled,
        help="or: a folder of images that exist, read with its subfolders in order of path, as --train_data_dir is",
    )
    group.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="of the pipeline (default: fp32; half precision changes the samples, the noise they start from included)",
    )


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (a sample is a function of seed and index)")
    group.add_argument(
        "--num_samples",
        type=int,
        help="samples to draw (default: 10000; papers use 50000, and a Frechet distance falls with the number), or "
        "images of --images to use (default: all)",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="samples or images at once (default: 64); another size changes the last bits of a sample, not its noise",
    )
    add_shared(group, "seed", seed={"help": "of the samples and of KID's subsets (default: 0)"})
    group.add_argument("--num_inference_steps", type=int, help="sampler steps (default: the pipeline's own)")
    group.add_argument(
        "--scheduler", help="class name of a diffusers scheduler, such as DDIMScheduler (default: the pipeline's own)"
    )
    group.add_argument(
        "--eta", type=float, help="noise of DDIM's steps: 0 none, 1 that of DDPM (default: the scheduler's, 0)"
    )
    group.add_argument(
        "--clip_sample",
        choices=["true", "false"],
        help="whether the scheduler clips its estimate of the clean image to [-1, 1] in every step (default: as its "
        "config says, for the Hub's DDPMs true; false in the paper's pixel tables, and for latents "
        "where the pipeline's own scheduler has no such setting)",
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        help="classifier-free guidance (default: the pipeline's own; distilled models, as turbo ones, want 0)",
    )
    group.add_argument("--height", type=int, help="pixels of a sample, where the pipeline takes it")
    group.add_argument("--width", type=int, help="pixels of a sample, where the pipeline takes it")
    add_shared(
        group,
        "max_sequence_length",
        max_sequence_length={
            "help": "tokens of a prompt, such as those of Stable Diffusion 3's T5 (default: the pipeline's own; of a "
            "student trained with another number its card has it)"
        },
    )
    group.add_argument(
        "--class_labels",
        type=int,
        nargs="+",
        help="sample i is of the i-th of these, over and over (default: all classes, equally often)",
    )
    add_shared(
        group,
        "label_column guidance_channels prompts caption_column",
        label_column={
            "help": "or: the column of --dataset_name or --train_data_dir that holds the labels; every sample has "
            "that of a row, in the order of a shuffle by --seed, so that classes are as frequent as there"
        },
        caption_column={"help": "or: the column of --dataset_name that holds the prompts"},
    )


def _reference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reference: one of these five")
    add_shared(group, "dataset_name train_data_dir")
    group.add_argument("--reference_images", type=bundled, help="or: a folder of images, in their own size")
    group.add_argument(
        "--reference_stats", type=bundled, help="or: an .npz file of --save_stats, clean-fid or pytorch-fid"
    )
    group.add_argument("--cleanfid_stats", help="or: the name of statistics that clean-fid publishes, such as cifar10")
    details = parser.add_argument_group("reference, details")
    add_shared(
        details,
        "dataset_config_name split image_column resolution crop image_interpolation_mode background skip_bad_images",
        resolution={
            "help": "bring samples and reference to this many pixels a side: shorter side resized, centre cut "
            "(default: images of a dataset to the size of the samples, files of a folder not at all)"
        },
        skip_bad_images={
            "help": "leave out images that cannot be decoded, of --images and of the reference, and say how many; "
            "default: stop and name the first"
        },
        crop={
            "help": "top, left, height and width in pixels: the box of every reference image that stands for it, cut "
            "before anything is resized, as in training (57 25 128 128 are CelebA's faces); samples are not cut"
        },
        image_interpolation_mode={
            "help": "Pillow's filter for both, of which all but nearest antialias (default: bilinear; MS-COCO tables "
            "of Stable Diffusion have bicubic)"
        },
    )
    details.add_argument("--max_reference_samples", type=int, help="use the first this many images")
    details.add_argument(
        "--cleanfid_res", type=int, help="resolution in the name of clean-fid's statistics, such as 32"
    )
    details.add_argument("--cleanfid_split", default="train", help="split in their name (default: train)")
    details.add_argument("--save_stats", help="write the reference's statistics here, for --reference_stats")
    details.add_argument(
        "--reference_cache_dir",
        metavar="DIR",
        default=str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lift-and-place"),
        help="what was measured of reference images is kept here by their content (default: ~/.cache/lift-and-place)",
    )


def _metrics(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help="of: fid (Frechet distance), kid (kernel distance), pr (precision and recall, k = 5), is (Inception "
        "Score), clip (CLIP score; needs prompts). Default: fid kid pr; fid alone where the reference is statistics. "
        "fid needs no more memory for more samples, kid and pr keep all features",
    )
    add_shared(
        group,
        "feature_extractor inception_path",
        feature_extractor={
            "default": "inception",
            "help": "inception (default: clean-fid's; then the Frechet distance is FID), or any transformers image "
            "model, folder or Hub id: DINOv2, CLIP, a ResNet, assets/classifier",
        },
    )
    group.add_argument(
        "--fid_mode",
        choices=["clean", "legacy_pytorch"],
        default="clean",
        help="resizing and port of inception: clean-fid's (default), or that of pytorch-fid, for older numbers",
    )
    group.add_argument(
        "--clip_model",
        type=bundled,
        default="openai/clip-vit-large-patch14",
        help="for the CLIP score, folder or Hub id (default: openai/clip-vit-large-patch14)",
    )
    group.add_argument("--kid_subsets", type=int, default=100, help="subsets that KID averages over (default: 100)")
    group.add_argument("--kid_subset_size", type=int, default=1000, help="samples in each (default: 1000)")


def _cost(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cost")
    group.add_argument(
        "--compare_to",
        type=bundled,
        help="a second pipeline, such as the teacher: its metrics by the same protocol from the same noise, its size, "
        "time and memory beside the first's. It takes as long as to measure that one by itself",
    )
    group.add_argument(
        "--compare_num_samples",
        type=int,
        help="samples drawn from it (default: as many as from the first); with another number only size, time and "
        "memory are measured, which a few batches tell",
    )


def _output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add_shared(
        group,
        "output_dir overwrite_output_dir",
        output_dir={
            "default": "evaluation",
            "help": "metrics.json, samples.png and, while sampling, the samples (default: evaluation). A run that was "
            "stopped goes on with the same command",
        },
        overwrite_output_dir={"help": "delete what an earlier evaluation left there, its samples too"},
    )
    group.add_argument(
        "--keep_images",
        action=Switch,
        help="leave the samples in images/ of --output_dir; the same command with other metrics then uses them",
    )
    group.add_argument(
        "--update_model_card",
        action=Switch,
        help="write the metrics into README.md of the pipeline's folder, in the Hub's model-index form",
    )


def _speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    add_shared(
        group,
        "num_cpu_threads dataloader_num_workers",
        num_cpu_threads={
            "help": "batches that a process works on at once on the CPU, each in a thread of its own, so that no "
            "number depends on how many (default: one for each of its cores). Memory grows with them"
        },
    )


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for values out of range and for flags that contradict each other; fills in the defaults."""
    positive = (
        "batch_size num_inference_steps height width max_reference_samples resolution cleanfid_res kid_subset_size "
        "compare_num_samples num_cpu_threads max_sequence_length"
    )
    check_positive(args, positive)
    check_not_negative(args, "dataloader_num_workers")
    check_background(args)
    if args.dataset_name:
        args.split = args.split or "train"
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed is {args.seed}; it must lie from 0 to 2**32 - 1.")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise UsageError(f"--eta is {args.eta}; it must lie in [0, 1].")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale < float("inf"):
        raise UsageError(f"--guidance_scale is {args.guidance_scale}; it must be a number from 0 on.")
    for name in ("num_samples", "max_reference_samples", "kid_subsets", "kid_subset_size"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise UsageError(f"--{name} is {getattr(args, name)}; statistics need at least 2.")

    if bool(args.pretrained_model_name_or_path) == bool(args.images):
        found = "both" if args.images else "neither"
        raise UsageError(
            f"Give one of --pretrained_model_name_or_path, a pipeline, and --images, a folder; found {found}."
        )
    if args.pretrained_model_name_or_path and args.num_samples is None:
        args.num_samples = 10_000
    if args.compare_to and args.compare_num_samples is None:
        args.compare_num_samples = args.num_samples
    given = [f"--{name}" for name in REFERENCES if getattr(args, name)]
    if len(given) != 1:
        raise UsageError(
            f"Give one reference to measure against, found {' and '.join(given) or 'none'}: "
            f"{', '.join(f'--{name}' for name in REFERENCES)}."
        )
    _check_metrics(args)
    check_crop(args)
    if args.crop and (args.reference_stats or args.cleanfid_stats):
        raise UsageError(
            "--crop cuts reference images, and statistics are of images as they were: give the images, or leave it "
            "out."
        )
    if args.cleanfid_stats and args.feature_extractor != "inception":
        raise UsageError(
            f"--cleanfid_stats are of inception's features, not of --feature_extractor {args.feature_extractor}."
        )
    if args.cleanfid_stats and not args.cleanfid_res:
        raise UsageError("--cleanfid_stats needs --cleanfid_res, the resolution in the name of the statistics.")
    if args.prompts and args.caption_column:
        raise UsageError("Give one of --prompts and --caption_column; found both.")
    if args.prompts:
        read_prompts_file(args.prompts)  # what it would refuse, now and not when models are loaded
    for name in ("caption_column", "label_column"):
        if getattr(args, name) and not (args.dataset_name or args.train_data_dir):
            raise UsageError(f"--{name} is a column of --dataset_name or --train_data_dir: give one.")
    if args.class_labels and args.label_column:
        raise UsageError("Give one of --class_labels and --label_column; found both.")
    pipeline = args.pretrained_model_name_or_path
    if args.update_model_card and not (pipeline and Path(pipeline).is_dir()):
        raise UsageError("--update_model_card writes into a pipeline's folder: give one as the pipeline.")
    if args.save_stats and (Path(args.save_stats).is_dir() or not Path(args.save_stats).resolve().parent.is_dir()):
        raise UsageError(f"--save_stats {args.save_stats}: name a file in a folder that exists.")
    _check_output_dir(args)


def _check_metrics(args: argparse.Namespace) -> None:
    is_statistics = args.reference_stats or args.cleanfid_stats
    if args.metrics is None:
        args.metrics = ["fid"] if is_statistics else ["fid", "kid", "pr"]
    for name in args.metrics:
        if name not in METRICS:
            raise UsageError(f"--metrics {name}: there is no such metric. There are {', '.join(METRICS)}.")
        if name in ("kid", "pr") and is_statistics:
            raise UsageError(
                f"--metrics {name} needs the features of the reference, and statistics are their mean and covariance "
                "only: give the images, or leave it out."
            )
    if "clip" in args.metrics and not (args.prompts or args.caption_column):
        raise UsageError("--metrics clip compares images with prompts: give --prompts FILE or --caption_column.")


def _check_output_dir(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    read = ("images reference_images train_data_dir dataset_name reference_stats prompts compare_to").split()
    for name in (*read, "pretrained_model_name_or_path"):
        path = getattr(args, name)
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"--{name} {path} lies in --output_dir {folder}; choose another --output_dir.")
    for name in ("images", "reference_images", "train_data_dir"):  # whose images would be found there next time
        path = getattr(args, name)
        if path and folder.resolve().is_relative_to(Path(path).resolve()):
            raise UsageError(f"--output_dir {folder} lies in --{name} {path}; choose another --output_dir.")
    unfinished = args.pretrained_model_name_or_path and (folder / "sampling" / "protocol.json").is_file()
    check_output_folder(
        args,
        "is not empty, and holds no unfinished evaluation to go on with. Choose another folder, or delete the earlier "
        "evaluation in it with --overwrite_output_dir.",
        unless=bool(unfinished or args.overwrite_output_dir),
    )


def _idle_flags(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """The table of `warn_of_idle_flags`."""
    samples_flags = (
        "revision variant dtype allow_pickle_weights num_inference_steps scheduler eta guidance_scale height width "
        "max_sequence_length guidance_channels class_labels label_column keep_images compare_to clip_sample"
    )
    return [
        (samples_flags, bool(args.images), "--pretrained_model_name_or_path"),
        ("prompts caption_column", bool(args.images) and "clip" not in args.metrics, "--metrics clip"),
        ("dataset_config_name", not args.dataset_name, "--dataset_name"),
        ("split image_column", not (args.dataset_name or args.train_data_dir), "--dataset_name or --train_data_dir"),
        ("max_reference_samples", bool(args.reference_stats or args.cleanfid_stats), "images as the reference"),
        ("cleanfid_res cleanfid_split", not args.cleanfid_stats, "--cleanfid_stats"),
        ("fid_mode inception_path", args.feature_extractor != "inception", "--feature_extractor inception"),
        (
            "image_interpolation_mode",
            not args.resolution and bool(args.reference_images or args.reference_stats or args.cleanfid_stats),
            "--resolution, or a dataset as the reference",
        ),
        ("clip_model", "clip" not in args.metrics, "--metrics clip"),
        ("kid_subsets kid_subset_size", "kid" not in args.metrics, "--metrics kid"),
        ("compare_num_samples", not args.compare_to, "--compare_to"),
    ]
