# SPDX-License-Identifier: Apache-2.0
"""The command line that both training scripts share, in groups. What contradicts itself is refused here."""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from utils.command_line import ArgumentParser, Switch, UsageError, bundled, warn_of_idle_flags
from utils.download_cache import use_download_cache
from utils.flags import (
    WEIGHTING_SCHEMES,
    add_hub_arguments,
    add_shared,
    check_background,
    check_crop,
    check_data,
    check_group_size,
    check_not_negative,
    check_output_folder,
    check_positive,
)
from utils.output_dir import wanted_checkpoint

MAX_TRAIN_STEPS = 100_000
RENAMED = {"--validation_images": "--validation_shown_samples"}
STUDENTS = (
    "pruning_ratio",
    "student_preset",
    "student_depth",
    "kept_layers",
    "student_config",
    "student_model_name_or_path",
)
# a command line without any of these is the default recipe's, whatever else is in it
BEGINNINGS = ("pretrained_model_name_or_path", *STUDENTS, "dataset_name", "train_data_dir", "latent_cache_dir")


def parse_args(
    description: str,
    add_method_arguments: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse and check the command line; one that names no teacher, student or data is that of the embedded default
    recipe, with the flags that are given behind it.

    Raises:
        UsageError: an unknown or misspelt flag, a value out of range, or flags that contradict each other.
    """
    parser = ArgumentParser(description=description, renamed=RENAMED)
    add_method_arguments(parser.add_argument_group("method"))
    groups = (_teacher_and_student, _data, _loss, _optimisation, _speed_and_memory, _output, _validation)
    for add_group in groups:
        add_group(parser)
    add_hub_arguments(parser).add_argument(
        "--push_to_hub",
        action=Switch,
        help="publish the student at the end; the token is checked before anything is written, and the repository "
        "made before training",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if all(getattr(args, name) is None for name in BEGINNINGS):
        recipe = f"assets/default{'' if hasattr(args, 'grouping') else '_lift'}.args"  # LIFT has no groups
        if int(os.environ.get("LOCAL_RANK", 0)) <= 0:
            print(
                f"No teacher, student or data is named: running the embedded default, @{recipe}"
                f"{', with the flags that are given' if argv else ''}. --help lists every flag.",
                flush=True,
            )
        args = parser.parse_args([f"@{recipe}", *argv])
    with parser.placed_errors():
        _check(args)
    use_download_cache(args.cache_dir)
    warn_of_idle_flags(args, parser, _idle_flags(args))
    return args


def layers(text: str) -> list[int]:
    """Of `--kept_layers`."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers with commas, such as 0,3,7") from None


def _teacher_and_student(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher and student")
    add_shared(
        group,
        "pretrained_model_name_or_path revision variant allow_pickle_weights pretrained_vae_model_name_or_path "
        "cache_dir",
        pretrained_model_name_or_path={
            "help": "the teacher: a diffusers pipeline folder or Hub id. Without it the student trains from scratch "
            "on --student_config (train_lift.py, no distillation)"
        },
    )
    group.add_argument(
        "--teacher_dtype",
        choices=["fp32", "fp16", "bf16"],
        help="dtype of the frozen teacher; default: that of --mixed_precision, as it only runs forward",
    )
    group.add_argument(
        "--pruning_ratio",
        type=float,
        help="make the student by cutting this share of every layer's channels, in (0, 1); .8 leaves about 5 %% of "
        "the parameters",
    )
    group.add_argument(
        "--student_preset",
        help="or: drop whole blocks of a Stable Diffusion U-Net: bk_base, bk_small, bk_tiny (BK-SDM), or for SDXL "
        "koala_1b, koala_700m (KOALA); of a DiT: d14, d7, d4, so many of its layers are left (TinyFusion)",
    )
    group.add_argument("--student_depth", type=int, help="or: keep so many of a transformer's layers")
    group.add_argument(
        "--kept_layers",
        type=layers,
        metavar="N,N,...",
        help="or: keep these of a transformer's layers, numbered from 0, with commas",
    )
    group.add_argument(
        "--layer_choice",
        choices=["even", "scored"],
        help="which layers --student_depth and d14, d7, d4 keep: evenly spaced ones with first and last, or those "
        "whose leaving out changes the diffusion loss on real images most, to first order (default: even)",
    )
    group.add_argument(
        "--student_config",
        type=bundled,
        help="or: the student's config.json, freshly initialised (Stable Diffusion: with what fits of the teacher)",
    )
    group.add_argument(
        "--student_model_name_or_path",
        type=bundled,
        help="or: a student that exists, its U-Net or pipeline folder",
    )
    group.add_argument(
        "--student_init",
        choices=["taylor", "magnitude", "random"],
        default="taylor",
        help="which channels --pruning_ratio keeps: those with the largest |weight * gradient| of the diffusion loss "
        "on real images (taylor, as Diff-Pruning), the largest weights, or random new weights",
    )
    group.add_argument(
        "--taylor_timesteps",
        type=int,
        help="timesteps that the scores of --student_init taylor are summed over, spread evenly over the schedule; "
        "the authors take all 1000. Default: up to 20, ending before the first whose loss is under 5 %% of the "
        "largest (Diff-Pruning's rule)",
    )
    group.add_argument(
        "--dropout",
        type=float,
        help="the student's dropout while it trains, in [0, 1), kept in its config; the teacher always runs without. "
        "Default: as its config says, which a pruned student has from its teacher",
    )
    group.add_argument(
        "--lora_rank",
        type=int,
        help="train only LoRA adapters of this rank on the student's attention; saved as "
        "pytorch_lora_weights.safetensors beside the student they belong to",
    )
    group.add_argument("--fuse_lora", action=Switch, help="add the adapters to the saved student's weights")


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add_shared(
        group,
        "dataset_name dataset_config_name train_data_dir image_column caption_column label_column resolution crop "
        "image_interpolation_mode",
    )
    group.add_argument(
        "--train_split",
        help="split of the dataset to train on (default: train), or a subfolder of --train_data_dir (default: all of "
        "it)",
    )
    group.add_argument("--center_crop", action=Switch, help="crop the centre; default: a random place")
    group.add_argument("--random_flip", action=Switch, help="flip half of the images left to right")
    add_shared(
        group,
        "background skip_bad_images dataloader_num_workers",
        dataloader_num_workers={
            "help": "processes that decode images (default: 0, the training process; sets under 256 MiB are decoded "
            "once and held, and need none)"
        },
    )
    group.add_argument(
        "--proportion_empty_prompts",
        type=float,
        help="share of captions or labels that teacher and student both see as none, for guidance (default: .1, the "
        "paper's)",
    )
    group.add_argument(
        "--latent_cache_dir",
        metavar="DIR",
        help="encode latents and prompts once into this folder, then free VAE and text encoders; it may be used "
        "again, also without the dataset's flags",
    )
    group.add_argument(
        "--cache_variants",
        type=int,
        help="crops and flips of each image, one an epoch in turn (default: 1 with --latent_cache_dir, else ever new "
        "ones)",
    )
    add_shared(group, "max_sequence_length")
    group.add_argument("--max_train_samples", type=int, help="use the first this many rows, to try things out")


def _loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "loss: lambda_task * diffusion + lambda_kd_output * output + lambda_kd_feat * feature"
    )
    group.add_argument(
        "--lambda_task",
        type=float,
        default=1.0,
        help="weight of the diffusion loss (default: 1; DiT aside, the paper's)",
    )
    group.add_argument(
        "--lambda_kd_output",
        type=float,
        default=1.0,
        help="weight of the output distillation loss (default: 1, the paper's but for DiT); with both distillation "
        "weights 0 the teacher never runs",
    )
    group.add_argument(
        "--lambda_kd_feat",
        type=float,
        default=0.0,
        help="weight of the feature loss on matching blocks (default: 0, off). The paper's rows in this per-element "
        "form: 1 for Stable Diffusion, but 4.7e-5 for CelebA-64, 3.0e-5 for Bedroom-256, 6.6e-5 for CIFAR-10",
    )
    group.add_argument(
        "--feature_mask_sigma",
        type=float,
        metavar="S",
        default=0.0,
        help="leave out of the feature loss what lies more than S standard deviations from the mean of its sample, in "
        "student and teacher each by its own (default: 0, off; DiT's rows have 2)",
    )
    group.add_argument(
        "--feature_weighting",
        choices=["constant", "linear"],
        default="constant",
        help="linear lets --lambda_kd_feat fall to 0 over the run, as DiT's rows (default: constant)",
    )
    group.add_argument(
        "--coarse_norm",
        choices=["l1", "l2"],
        default="l1",
        help="of (slope - 1) and intercept (default: l1, the paper's but for DiT)",
    )
    group.add_argument(
        "--coarse_scale",
        type=float,
        default=1.0,
        help="weight of the coarse term (default: 1, the paper's equation)",
    )
    group.add_argument(
        "--weighting",
        choices=["adaptive", "constant", "linear", "cosine"],
        default="adaptive",
        help="weight w of the fine term: adaptive is 1 - min(1, coarse), the paper's; constant is 1; linear and "
        "cosine rise from 0 to 1 over the run",
    )
    group.add_argument(
        "--timestep_balance",
        type=float,
        metavar="P",
        default=0.0,
        help="divide a sample's output loss (of LIFT and PLACE the fine part) by the P-th power of its running mean "
        "in that twentieth of the schedule, over the mean of all: at 1 all noise levels count alike (default: 0, off, "
        "the paper's)",
    )
    group.add_argument(
        "--task_balance", type=float, metavar="P", default=0.0, help="the same of the diffusion loss (default: 0, off)"
    )
    group.add_argument(
        "--noise_offset",
        type=float,
        default=0.0,
        help="add this much noise that is one value a channel, so that images may be darker or brighter (default: 0)",
    )
    group.add_argument(
        "--input_perturbation",
        type=float,
        default=0.0,
        help="noise in the input that the target does not know of, as a share of the noise; 0.1 is usual (default: 0)",
    )
    group.add_argument(
        "--snr_gamma", type=float, help="min-SNR weighting of the diffusion loss alone; 5 is usual, default: off"
    )
    group.add_argument(
        "--antithetic_timesteps",
        action=Switch,
        help="draw timesteps in pairs (t, T - 1 - t), as DDIM and the authors do in pixels: a steadier loss",
    )
    group.add_argument(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        help="of a flow (Stable Diffusion 3): times are drawn by logit_normal or mode; or uniformly, and the "
        "diffusion loss alone is weighed by sigma_sqrt (sigma ** -2), cosmap, or by none (default: logit_normal, "
        "diffusers')",
    )
    group.add_argument("--logit_mean", type=float, help="of logit_normal; below 0 noisier (default: 0)")
    group.add_argument("--logit_std", type=float, help="of logit_normal (default: 1)")
    group.add_argument(
        "--mode_scale", type=float, help="of mode, from -1 to 1.75; 0 is uniform (default: 1.29, diffusers')"
    )


def _optimisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--max_train_steps", type=int, default=MAX_TRAIN_STEPS, help="optimizer steps (default: 100,000)"
    )
    group.add_argument(
        "--num_train_epochs", type=float, help="or: how often every image is seen, from which the steps are counted"
    )
    group.add_argument(
        "--train_batch_size", type=int, default=64, help="images per process and micro-step (default: 64)"
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step (default: 1)"
    )
    group.add_argument("--optimizer", choices=["adamw", "adam"], default="adamw", help="default: adamw")
    group.add_argument("--use_8bit_adam", action=Switch, help="8-bit AdamW or Adam of bitsandbytes (CUDA)")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="default: 2e-4, the paper's for CelebA")
    group.add_argument(
        "--scale_lr",
        action=Switch,
        help="multiply --learning_rate by the images of a step: batch size, accumulated, of all processes",
    )
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        help="default: constant, the paper's but for DiT",
    )
    group.add_argument(
        "--min_lr_rate",
        type=float,
        default=0.0,
        help="--lr_scheduler cosine falls to this share of the peak, as transformers' cosine_with_min_lr (default: 0; "
        "DiT's rows have .5)",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="optimizer steps to reach the peak (default: 0)")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="default: .9")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="default: .999")
    group.add_argument(
        "--adam_weight_decay",
        type=float,
        default=0.0,
        help="default: 0, the paper's for pixels; its Stable Diffusion rows have 1e-2",
    )
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="default: 1e-8")
    group.add_argument(
        "--max_grad_norm",
        type=float,
        default=1.0,
        help="clip the gradient to this norm, 0 for not at all (default: 1, the authors' for Stable Diffusion; their "
        "pixel runs clip another form of the loss, or not at all: docs/paper.md)",
    )
    group.add_argument(
        "--use_ema",
        action=Switch,
        help="average the weights over steps; samples, distances and the export then use the average",
    )
    group.add_argument("--ema_decay", type=float, default=0.9999, help="of the average per step (default: .9999)")
    group.add_argument(
        "--ema_inv_gamma",
        type=float,
        help="let the decay grow up to --ema_decay as 1 - (1 + step / inv_gamma) ** -power (default: off, and then 1)",
    )
    group.add_argument("--ema_power", type=float, help="of that growth (default: off, and then .75)")
    add_shared(group, "seed")


def _speed_and_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast dtype; default: accelerate's config"
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=Switch,
        help="recompute the student's activations: less memory, slower",
    )
    add_shared(
        group,
        "num_cpu_threads",
        num_cpu_threads={
            "help": "threads of a process that trains on the CPU; default: its share of the cores, where `accelerate "
            "launch` would give it one"
        },
    )
    group.add_argument("--allow_tf32", action=Switch, help="TF32 matrix products on Ampere and newer: faster")
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action=Switch,
        help="xformers attention in teacher and student; where it is absent or refuses, PyTorch's stays (warned of)",
    )


def _output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add_shared(
        group,
        "output_dir overwrite_output_dir",
        output_dir={"default": "student", "help": "where the student is saved (default: student)"},
        overwrite_output_dir={"help": "start anew in a folder that is not empty; its files go"},
    )
    group.add_argument("--logging_steps", type=int, default=50, help="optimizer steps between logs (default: 50)")
    group.add_argument(
        "--report_to",
        default="tensorboard",
        help="tensorboard, wandb or any tracker accelerate knows, several with commas, all that are "
        "installed, or none (default: tensorboard)",
    )
    group.add_argument("--tracker_project_name", default="lift-and-place", help="default: lift-and-place")
    group.add_argument(
        "--checkpointing_steps", type=int, default=1000, help="optimizer steps between checkpoints (default: 1000)"
    )
    group.add_argument(
        "--checkpoints_total_limit", type=int, default=2, help="newest checkpoints kept (default: 2, as one may break)"
    )
    group.add_argument("--resume_from_checkpoint", help="`latest`, or a checkpoint folder")
    group.add_argument(
        "--allow_changed_arguments",
        action=Switch,
        help="resume with another teacher, data, loss or batch; what changed is printed, the run is no longer exact",
    )
    group.add_argument(
        "--max_train_minutes", type=float, help="save and stop after this long, for queues with a time limit"
    )
    group.add_argument(
        "--dry_run", action=Switch, help="check everything, print the plan with a memory estimate, and stop"
    )


def _validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps",
        type=int,
        default=5000,
        help="optimizer steps between sample grids; one is always made at the end (default: 5000)",
    )
    group.add_argument(
        "--validation_shown_samples", type=int, default=16, help="samples a row of the grid, 0 for none (default: 16)"
    )
    group.add_argument(
        "--validation_prompts", nargs="+", help="for text-to-image students; default: the first images' captions"
    )
    group.add_argument(
        "--validation_guidance_scale",
        type=float,
        help="classifier-free guidance of samples, 0 for none (default: the stock pipeline's own, 7.5, for XL 5, for "
        "Stable Diffusion 3 7, for DiT 4; none where the teacher's scheduler is as a turbo model's, LCM's or TCD's. "
        "Give 0 for a distilled flow, as SD3.5-large-turbo, whose files do not tell it)",
    )
    group.add_argument(
        "--validation_guidance_channels",
        type=int,
        choices=[3, 4],
        help="latent channels of a DiT that are guided: 3, as in its paper, or 4, as the stock pipeline (default: 4)",
    )
    group.add_argument("--validation_num_inference_steps", type=int, default=50, help="sampler steps (default: 50)")
    group.add_argument(
        "--validation_feature_extractor",
        type=bundled,
        help="a transformers image model, folder or Hub id; measures the Frechet distance between the features of "
        "samples and of real images, and keeps the best student by it",
    )
    group.add_argument(
        "--validation_num_samples", type=int, default=2048, help="samples for that distance (default: 2048)"
    )
    group.add_argument("--validation_batch_size", type=int, default=128, help="sampled at once (default: 128)")
    group.add_argument("--validation_split", help="split of the real images (default: that of --train_split)")


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for values out of range and for flags that contradict each other."""
    positive = (
        "resolution max_train_samples max_train_steps train_batch_size gradient_accumulation_steps learning_rate "
        "snr_gamma adam_epsilon logging_steps checkpointing_steps checkpoints_total_limit validation_steps "
        "validation_num_inference_steps validation_num_samples validation_batch_size max_train_minutes "
        "num_cpu_threads lora_rank cache_variants num_train_epochs ema_inv_gamma ema_power taylor_timesteps "
        "student_depth max_sequence_length logit_std"
    )
    not_negative = (
        "lambda_task lambda_kd_output lambda_kd_feat dataloader_num_workers lr_warmup_steps adam_weight_decay seed "
        "max_grad_norm coarse_scale timestep_balance task_balance noise_offset input_perturbation "
        "validation_shown_samples validation_guidance_scale feature_mask_sigma"
    )
    check_positive(args, positive)
    check_not_negative(args, not_negative)
    for name in ("adam_beta1", "adam_beta2", "ema_decay", "min_lr_rate"):
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}; it must lie in [0, 1).")
    if args.min_lr_rate and args.lr_scheduler != "cosine":
        raise UsageError(
            f"--min_lr_rate {args.min_lr_rate:g}: --lr_scheduler {args.lr_scheduler} does not fall to it. Leave it "
            "out, or give --lr_scheduler cosine."
        )
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout is {args.dropout}; it must lie in [0, 1).")
    check_group_size(args)
    if args.pruning_ratio is not None and not 0 < args.pruning_ratio < 1:
        raise UsageError(f"--pruning_ratio is {args.pruning_ratio}; it must lie between 0 and 1, both excluded.")

    if args.mode_scale is not None and not -1 <= args.mode_scale <= 2 / (math.pi - 2):
        raise UsageError(
            f"--mode_scale is {args.mode_scale}; it must lie in [-1, 1.75], beyond which draws share times."
        )
    if args.proportion_empty_prompts is not None and not 0 <= args.proportion_empty_prompts <= 1:
        raise UsageError(f"--proportion_empty_prompts is {args.proportion_empty_prompts}; it must lie in [0, 1].")

    given = [f"--{name}" for name in STUDENTS if getattr(args, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UsageError(f"Give one of --{', --'.join(STUDENTS)} to say what the student is; found {found}.")
    if not args.pretrained_model_name_or_path:
        for name in ("pruning_ratio", "student_depth", "kept_layers"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} cuts a teacher: give it with --pretrained_model_name_or_path.")
        if args.lambda_kd_output or args.lambda_kd_feat:
            raise UsageError(
                "No --pretrained_model_name_or_path, so nothing to distil from: name the teacher, or train from "
                "scratch with --lambda_kd_output 0 --lambda_kd_feat 0."
            )
    if not (args.lambda_task or args.lambda_kd_output or args.lambda_kd_feat):
        raise UsageError("--lambda_task, --lambda_kd_output and --lambda_kd_feat are all 0: nothing to train on.")
    if args.num_train_epochs and args.max_train_steps != MAX_TRAIN_STEPS:
        raise UsageError(
            f"Give one of --num_train_epochs and --max_train_steps; found both ({args.num_train_epochs:g} and "
            f'{args.max_train_steps:,}). A recipe\'s is undone by --max_train_steps "".'
        )
    check_data(args, or_none=bool(args.latent_cache_dir))
    check_background(args)
    check_crop(args)
    if args.train_data_dir and args.validation_split not in (None, "train") and not args.train_split:
        raise UsageError(
            f"--validation_split {args.validation_split} is a part of --train_data_dir, and all of it is trained on: "
            "give --train_split, the subfolder to train on."
        )
    if getattr(args, "grouping", None) == "patch" and math.isqrt(args.group_size) ** 2 != args.group_size:
        raise UsageError(f"--group_size is {args.group_size}; --grouping patch needs a square number, such as 16.")

    if args.timestep_balance and getattr(args, "output_loss", None) == "log":
        raise UsageError(
            f"--timestep_balance {args.timestep_balance}: --output_loss log divides every sample's error by itself "
            "already, and a logarithm has no mean to divide by. Leave one of the two out."
        )

    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        raise UsageError("--resume_from_checkpoint continues a run, --overwrite_output_dir deletes it: give one.")
    inputs = (
        "pretrained_model_name_or_path dataset_name train_data_dir student_config student_model_name_or_path "
        "validation_feature_extractor pretrained_vae_model_name_or_path cache_dir latent_cache_dir"
    )
    needed = [Path.cwd(), *(Path(getattr(args, name)) for name in inputs.split() if getattr(args, name))]
    if args.overwrite_output_dir:
        for path in needed:
            if path.exists() and path.resolve().is_relative_to(output_dir.resolve()):
                raise UsageError(f"--overwrite_output_dir would delete {path}, which lies in {output_dir}.")
    checkpoint = wanted_checkpoint(args)
    # a job that died before its first checkpoint left a folder of ours, and no student in it
    begun = (output_dir / "checkpoints").is_dir() and not (output_dir / "model_index.json").exists()
    found = "has no checkpoint to go on from" if args.resume_from_checkpoint else "is not empty"
    try:
        check_output_folder(
            args,
            f"{found}. Continue a run with --resume_from_checkpoint latest, start anew with --overwrite_output_dir, "
            "or choose another folder.",
            unless=bool(checkpoint or args.overwrite_output_dir or (args.resume_from_checkpoint and begun)),
        )
    except UsageError as error:
        if not args.dry_run:
            raise
        warnings.warn(f"{error} The run itself would be refused.", stacklevel=2)
    if args.resume_from_checkpoint and not checkpoint:
        nothing = f"no checkpoint in {output_dir.resolve() / 'checkpoints'}, so this run begins at step 0"
        warnings.warn(f"--resume_from_checkpoint {args.resume_from_checkpoint}: {nothing}.", stacklevel=2)
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or output_dir.resolve().name)
        except HFValidationError as error:
            raise UsageError(f"--hub_model_id: {error} Give name, user/name or organisation/name.") from error


def _idle_flags(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """The table of `warn_of_idle_flags`."""
    line_flags = "coefficients coarse_norm coarse_scale weighting group_size grouping"
    return [
        ("student_init", args.pruning_ratio is None, "--pruning_ratio"),
        (
            "taylor_timesteps",
            args.pruning_ratio is None or args.student_init != "taylor",
            "--pruning_ratio and --student_init taylor",
        ),
        (
            "layer_choice",
            args.student_depth is None and args.student_preset is None,
            "--student_depth, or --student_preset d14, d7 or d4",
        ),
        ("revision variant teacher_dtype", not args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"),
        ("ema_decay ema_inv_gamma ema_power", not args.use_ema, "--use_ema"),
        ("fuse_lora", not args.lora_rank, "--lora_rank"),
        (f"output_loss timestep_balance {line_flags}", not args.lambda_kd_output, "--lambda_kd_output above 0"),
        (line_flags, getattr(args, "output_loss", "lift") != "lift", "--output_loss lift"),
        ("feature_mask_sigma feature_weighting", not args.lambda_kd_feat, "--lambda_kd_feat above 0"),
        ("snr_gamma task_balance", not args.lambda_task, "--lambda_task above 0"),
        (
            "logit_mean logit_std",
            args.weighting_scheme not in (None, "logit_normal"),
            "--weighting_scheme logit_normal",
        ),
        ("mode_scale", args.weighting_scheme != "mode", "--weighting_scheme mode"),
        (
            "weighting_scheme",
            not args.lambda_task and args.weighting_scheme in ("sigma_sqrt", "cosmap"),
            "--lambda_task above 0",
        ),
        ("lr_warmup_steps", args.lr_scheduler == "constant", "an --lr_scheduler with a warm-up"),
        ("dataset_config_name", not args.dataset_name, "--dataset_name"),
        ("train_split", not (args.dataset_name or args.train_data_dir), "--dataset_name or --train_data_dir"),
        (
            "validation_num_samples validation_batch_size validation_split",
            not args.validation_feature_extractor,
            "--validation_feature_extractor",
        ),
        ("allow_changed_arguments", not args.resume_from_checkpoint, "--resume_from_checkpoint"),
        ("hub_model_id hub_private_repo", not args.push_to_hub, "--push_to_hub"),
    ]
