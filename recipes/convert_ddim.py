# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of DDIM's code (github.com/ermongroup/ddim) to a pipeline, as the paper's CelebA-64 teacher is one.

    python recipes/convert_ddim.py ckpt.pth --allow_pickle_weights --config recipes/ddpm_celeba64_teacher.json \\
        --output_dir ddpm-celeba64

Its training saves a list [model, optimizer, epoch, step, EMA], of which the EMA is taken, or where there is none the
model; its published files are one state dict. The pipeline's scheduler has DDIM's linear betas and does not clip.
"""

import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.command_line import ArgumentParser, UsageError, bundled, run, start  # noqa: E402
from utils.flags import add_shared, check_output_folder  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The command line, checked. Raises UsageError."""
    parser = ArgumentParser(description=__doc__, usage="%(prog)s CHECKPOINT [flags]")
    parser.add_argument("checkpoint", help="the file, such as ckpt.pth")
    add_shared(parser, "allow_pickle_weights", allow_pickle_weights={"help": "it is a pickle: read it, weights only"})
    parser.add_argument(
        "--config",
        type=bundled,
        default=bundled("recipes/ddpm_celeba64_teacher.json"),
        help="config.json of the UNet2DModel (default: recipes/ddpm_celeba64_teacher.json)",
    )
    add_shared(parser, "output_dir", output_dir={"default": "ddpm-celeba64", "help": "default: ddpm-celeba64"})
    args = parser.parse_args(argv)
    if not args.allow_pickle_weights:
        raise UsageError(f"{args.checkpoint} is a pickle: --allow_pickle_weights reads it, weights only.")
    check_output_folder(args, "is not empty: choose another folder.", unless=False)
    return args


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args)

import torch  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from torch import Tensor  # noqa: E402

from utils.backbones.loading import read_json_config  # noqa: E402

NAMES = (  # a part of DDIM's name -> of UNet2DModel's
    (r"^module\.", ""),  # of nn.DataParallel
    (r"^temb\.dense\.0", "time_embedding.linear_1"),
    (r"^temb\.dense\.1", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
    (r"^(down|up)\.(\d+)\.", r"\1_blocks.\2."),
    (r"^mid\.block_1", "mid_block.resnets.0"),
    (r"^mid\.attn_1", "mid_block.attentions.0"),
    (r"^mid\.block_2", "mid_block.resnets.1"),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def convert(state: dict[str, Tensor], config: dict) -> UNet2DModel:
    """The weights `state` of DDIM's `Model` in the `UNet2DModel` of `config`.

    Raises:
        UsageError: they are of another model.
    """
    stages, named = len(config["block_out_channels"]), {}
    for name, tensor in state.items():
        for part, ours in NAMES:
            name = re.sub(part, ours, name)
        # its up blocks are numbered from the outermost, diffusers' from the innermost
        name = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{stages - 1 - int(match[1])}", name)
        if "attentions" in name and tensor.ndim == 4:  # its 1x1 convolutions are linear layers there
            tensor = tensor[:, :, 0, 0]
        named[name] = tensor.float().contiguous()
    model = UNet2DModel.from_config(config)
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        raise UsageError(f"The checkpoint does not fit --config; give that of its model. {error}") from error
    return model.eval()


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """The state dict to take. Raises UsageError where there is none, or where reading it would run code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} cannot be read as a checkpoint of weights alone: {error}") from error
    states = content if isinstance(content, list | tuple) else [content]
    weights = [
        state for state in states if isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
    ]
    if not weights:
        raise UsageError(f"{path} holds {type(content).__name__}, no state dict and no list with one.")
    return weights[-1]  # the EMA comes last


def main(args: Namespace) -> None:
    """Read, convert, save."""
    model = convert(read_checkpoint(args.checkpoint), read_json_config(args.config, "--config"))
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    DDPMPipeline(model, scheduler).save_pretrained(args.output_dir)
    print(f"Saved: {args.output_dir}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    run(main, ARGS)
