# SPDX-License-Identifier: Apache-2.0
"""Step time and peak memory of a Stable Diffusion student, with and without cached latents and prompts.

    python benchmarks/cache_speed.py

The real SD 2.1-base architecture (teacher U-Net 865.9M, VAE, text encoder) with random weights, student bk_tiny, 256
pixels, batch 1: main() of train_place.py as it is, in a process of its own for each. The first step warms up and is
not counted; the encoding itself is not part of the cached run, which finds its cache made.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
UNET = {
    "sample_size": 32,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}


def make_teacher(folder: Path) -> None:
    """SD 2.1-base by its configs, random weights, float32; and four captioned pictures."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=2,
        sample_size=256,
    )
    StableDiffusionPipeline(
        vae,
        CLIPTextModel(CLIPTextConfig(vocab_size=49408, bos_token_id=0, eos_token_id=1, pad_token_id=1, **TEXT)),
        tokenizer,
        UNet2DConditionModel(**UNET),
        PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        None,
        None,
        None,
        False,
    ).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": letters[i]}) for i in range(4)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def run_once(steps: int, argv: list[str]) -> None:
    """In a process of its own: train, and print the steps' seconds and the peak of memory until the last of them."""
    import resource

    import train_place
    from utils.command_line import call
    from utils.training.log import RunLog

    class Done(Exception):
        pass

    times, end_step = [time.perf_counter()], RunLog.end_step

    def timed(self, step, *args):
        end_step(self, step, *args)
        times.append(time.perf_counter())
        if step == steps:  # exporting and saving are not what is measured
            raise Done

    RunLog.end_step = timed
    try:
        call(train_place, argv)
    except Done:
        pass
    seconds = [after - before for before, after in zip(times[1:], times[2:], strict=False)]
    print(json.dumps({"seconds": seconds, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, the first not counted (default: 6)")
    parser.add_argument("--folder", type=Path, help="scratch folder, kept (default: a temporary one; 6 GiB)")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        run_once(args.steps, args.child)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "teacher").exists():
            make_teacher(folder)
        flags = ["--pretrained_model_name_or_path", f"{folder}/teacher", "--train_data_dir", f"{folder}/images"]
        flags += [
            "--student_preset",
            "bk_tiny",
            "--resolution",
            "256",
            "--train_batch_size",
            "1",
            "--report_to",
            "none",
        ]
        flags += ["--max_train_steps", "1000000", "--validation_shown_samples", "0"]
        flags += ["--output_dir", f"{folder}/student"]
        flags += ["--overwrite_output_dir", "--lambda_kd_feat", "1"]
        cache = ["--latent_cache_dir", f"{folder}/cache"]
        print(f"{'':<12}{'s / step':>12}{'(range)':>18}{'peak GiB':>10}")
        for name, more, steps in (
            ("making it", cache, 1),
            ("uncached", [], args.steps),
            ("cached", cache, args.steps),
        ):
            command = [sys.executable, __file__, "--steps", str(steps), "--child", *flags, *more]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found = json.loads(done.stdout.strip().splitlines()[-1])
            if seconds := found["seconds"]:
                spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
                print(f"{name:<12}{statistics.median(seconds):>12.2f}{spread:>18}{found['gib']:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
