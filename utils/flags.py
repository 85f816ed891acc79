# SPDX-License-Identifier: Apache-2.0
"""Flags that stand in the command lines of several scripts, and the checks that all of them make: written once."""

import argparse
import math
from pathlib import Path

from PIL import ImageColor

from utils.command_line import FILES, HideToken, Switch, UsageError, bundled
from utils.files import is_stray
from utils.output_dir import LOCK

# Pillow's filters, by the names of diffusers' flag
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# where a flow's training looks, or what its loss weighs there, as in diffusers
WEIGHTING_SCHEMES = ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none")
SHARED = {
    # the model on the Hub
    "pretrained_model_name_or_path": {
        "type": bundled,
        "help": "the teacher: a diffusers pipeline folder or Hub id",
    },
    "revision": {"help": "branch, tag or commit of --pretrained_model_name_or_path on the Hub"},
    "variant": {"help": "weight file variant of --pretrained_model_name_or_path, such as fp16"},
    "allow_pickle_weights": {
        "action": Switch,
        "help": "load weights that are .bin files, not safetensors (unpickled with weights_only=True)",
    },
    "pretrained_vae_model_name_or_path": {
        "type": bundled,
        "help": "another VAE of the same latent space, such as one of SDXL that is safe in fp16; default: the "
        "teacher's, for SDXL in float32",
    },
    "cache_dir": {
        "metavar": "DIR",
        "help": "where models and datasets from the Hub are stored; default: the libraries' own place, see HF_HOME",
    },
    # data
    "dataset_name": {"type": bundled, "help": "a dataset on the Hub, or a local folder in its layout (parquet)"},
    "dataset_config_name": {"help": "the dataset's configuration, where it has several"},
    "train_data_dir": {"type": bundled, "help": "or: a folder of image files, read as `imagefolder`"},
    "image_column": {"default": "image", "help": "column of the images (default: image)"},
    "caption_column": {
        "help": "column of the captions, a string or a list of which one is drawn (default: text)",
    },
    "max_sequence_length": {
        "type": int,
        "help": "tokens of Stable Diffusion 3's T5, up to 512; where its pipeline goes without T5, tokens of zeros "
        "(default: 256, the stock pipeline's; diffusers' training scripts have 77)",
    },
    "label_column": {"help": "column of the class labels, integers that the teacher knows (default: label)"},
    "split": {"help": "of the dataset (default: train), or a subfolder of the folder of images (default: all of it)"},
    "background": {
        "help": "colour behind transparent pixels, a name or #rrggbb (default: white); images of 4 channels keep them",
    },
    "resolution": {"type": int, "help": "pixels a side; default: the teacher's sample_size"},
    "crop": {
        "type": int,
        "nargs": "+",
        "metavar": "N",
        "help": "top, left, height and width, in pixels of the stored image turned upright: this box alone is the "
        "picture, cut before anything is resized (57 25 128 128 are CelebA's faces); default: the whole image",
    },
    "image_interpolation_mode": {
        "choices": INTERPOLATIONS,
        "default": "bilinear",
        "help": "how images are resized: Pillow's filters, of which all but nearest antialias (default: bilinear)",
    },
    "skip_bad_images": {
        "action": Switch,
        "help": "where an image cannot be decoded, take the next good row and count it; default: stop and name it",
    },
    "dataloader_num_workers": {
        "type": int,
        "default": 0,
        "help": "processes that decode images (default: 0, none extra)",
    },
    # loss and error
    "group_size": {
        "type": int,
        "default": 16,
        "help": "elements that share a line, from 2 to those of a channel (default: 16, the paper's; 1 has no slope)",
    },
    # sampling and measuring
    "prompts": {
        "type": bundled,
        "metavar": "FILE",
        "help": "text file, one prompt a line; sample or image i has the i-th, over and over",
    },
    "guidance_channels": {
        "type": int,
        "choices": [3, 4],
        "help": "latent channels of a DiT that are guided: 3, as in its paper, or 4, as the stock pipeline (default: "
        "4)",
    },
    "feature_extractor": {"type": bundled},
    "inception_path": {
        "type": bundled,
        "help": "folder or file of inception's weights, where they cannot be downloaded",
    },
    # the run
    "seed": {"type": int, "default": 0, "help": "everything random follows from it (default: 0)"},
    "num_cpu_threads": {"type": int},
    "output_dir": {"metavar": "DIR"},
    "overwrite_output_dir": {"action": Switch},
}


def add_shared(group, names: str, **changes: dict) -> None:
    """Add flags of `SHARED` to a parser or a group of one. What a script says of one of them differently is given by
    its name: `seed={"help": ...}`; kind and default are the same everywhere, but for folders that scripts write to."""
    for name in names.split():
        group.add_argument(f"--{name}", **SHARED[name] | changes.get(name, {}))


def add_hub_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Who a push goes to, and by whose token: of a training run, and of `python -m utils.publishing.hub`."""
    group = parser.add_argument_group("Hub")
    group.add_argument("--hub_model_id", help="name, user/name or organisation/name; default: the student's folder")
    group.add_argument(
        "--hub_private_repo",
        action=Switch,
        help="create the repository private; default: as the account or organisation has it",
    )
    group.add_argument(
        "--hub_token",
        action=HideToken,
        default=argparse.SUPPRESS,
        help="for everything on the Hub, gated teachers too; written nowhere. Default and safer: HF_TOKEN, or that of "
        "`hf auth login`, as `ps` shows a command line, and so does `accelerate launch` when a run fails",
    )
    return group


def check_positive(args: argparse.Namespace, names: str) -> None:
    """Raises UsageError for one of the flags that was given and is not a finite number above 0."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} is {value}; it must be {'finite' if value == math.inf else 'above 0'}.")


def check_not_negative(args: argparse.Namespace, names: str) -> None:
    """Raises UsageError for one of the flags that was given and is below 0 or not finite."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(
                f"--{name} is {value}; it must {'be finite' if value == math.inf else 'not be negative'}."
            )


def check_group_size(args: argparse.Namespace) -> None:
    """Raises UsageError for a `--group_size` that has no slope; train_lift.py has no groups."""
    if getattr(args, "group_size", 2) < 2:
        raise UsageError(f"--group_size is {args.group_size}; a line needs at least 2 elements, the paper has 16.")


def check_crop(args: argparse.Namespace) -> None:
    """Raises UsageError for a `--crop` that is no box, or leaves `--center_crop` nothing to cut."""
    if args.crop is None:
        return
    found = f"--crop {' '.join(map(str, args.crop))}"
    if len(args.crop) != 4 or min(args.crop[:2]) < 0 or min(args.crop[2:]) < 1:
        raise UsageError(f"{found}: give four numbers, top and left from 0 on, then height and width above 0.")
    if getattr(args, "center_crop", False) and args.crop[2] == args.crop[3]:
        raise UsageError(
            f"{found} is a square already, of which --center_crop cuts nothing: give one of the two "
            "(--no-center_crop undoes a recipe's)."
        )


def check_data(args: argparse.Namespace, *, or_none: bool = False) -> None:
    """Raises UsageError unless one of `--dataset_name` and `--train_data_dir` is given; or neither, if `or_none`."""
    given = [name for name in ("dataset_name", "train_data_dir") if getattr(args, name)]
    if len(given) == 2 or not (given or or_none):
        found = "both" if given else "neither"
        raise UsageError(f"Give one of --dataset_name and --train_data_dir; found {found}.")


def check_background(args: argparse.Namespace) -> None:
    """Raises UsageError where `--background` is no colour, or none that hides what is behind it."""
    if not args.background:
        return
    try:
        *_, last = colour = ImageColor.getrgb(args.background)
    except ValueError as error:
        raise UsageError(f"--background: {error}. Give a colour's name, such as white, or #rrggbb.") from error
    if len(colour) == 4 and last < 255:
        raise UsageError(f"--background {args.background} is transparent itself. Give an opaque colour.")


def check_output_folder(args: argparse.Namespace, refusal: str, *, unless: bool) -> None:
    """Raises UsageError where `--output_dir` is a file, and, with `refusal`, where it is not empty `unless` it may."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file.")
    if folder.is_dir() and any(path.name != LOCK and not is_stray(path) for path in folder.iterdir()) and not unless:
        raise UsageError(f"--output_dir {folder} {refusal}")


def read_prompts_file(path: str) -> list[str]:
    """The lines of `--prompts`, without white space around them; a blank end of the file is no prompt.

    Raises:
        UsageError: no such file, no text, an empty line between others, or none at all.
    """
    if not Path(path).exists():
        raise UsageError(f"--prompts {path}: no such file. {FILES['prompts']}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read as a text file: {error}") from error
    prompts = [line.strip() for line in lines]
    if "" in prompts[:-1]:  # prompt i is that of image i: to leave a line out would shift all that follow
        raise UsageError(f"--prompts {path}: line {prompts.index('') + 1} is empty; one prompt a line.")
    if not any(prompts):
        raise UsageError("--prompts: there is no prompt in it.")
    return prompts
