# SPDX-License-Identifier: Apache-2.0
"""train_place.py beside a straight diffusers trainer with a teacher forward: images per second and peak memory.

    python benchmarks/peers.py

Both train the default's student on the default's data and batch, each run in a process of its own, in turn. The
straight trainer is what one writes from diffusers' unconditional example: transforms per image, a shuffled DataLoader,
everything through accelerator.prepare, EMA, the loss read every step for the progress bar, plus the teacher and a mean
squared error.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64


def straight_trainer(steps: int, student_folder: str) -> None:
    """Train and print images per second and GiB."""
    import datasets
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    from torchvision import transforms
    from tqdm.auto import tqdm

    accelerator = Accelerator()
    teacher = DDPMPipeline.from_pretrained(ROOT / "assets" / "teacher").unet
    teacher.requires_grad_(False).eval()
    model = UNet2DModel.from_pretrained(student_folder, subfolder="unet").train()
    ema = EMAModel(model.parameters(), decay=0.995)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    augment = transforms.Compose(
        [
            transforms.Resize(16, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    rows = datasets.load_dataset(str(ROOT / "assets" / "fashion_mnist_16"), split="train")
    rows.set_transform(lambda examples: {"input": [augment(image.convert("L")) for image in examples["image"]]})
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    progress, step = tqdm(total=steps), 0
    while step < steps:
        for batch in loader:
            if step == 5:
                start = time.perf_counter()  # the first steps warm up
            clean = batch["input"]
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (clean.shape[0],), device=clean.device)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(model):
                output = model(noisy, timesteps).sample
                with torch.no_grad():
                    target = teacher(noisy, timesteps).sample
                loss = F.mse_loss(output, noise) + F.mse_loss(output, target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            progress.update()
            progress.set_postfix(loss=loss.detach().item())
            step += 1
            if step == steps:
                break
    speed = (steps - 5) * BATCH / (time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{speed:.0f} images/s in training, peak memory {memory:.2f} GiB")


def measured(command: list[str]) -> tuple[float, float]:
    """Images per second and GiB that a command reports."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"(\d+) images/s in training, peak memory ([\d.]+) GiB", done.stdout)
    return float(found[1]), float(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run (default: 100)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--straight", metavar="STUDENT", help=argparse.SUPPRESS)  # the child process
    args = parser.parse_args()
    if args.straight:
        straight_trainer(args.steps, args.straight)
        return
    with tempfile.TemporaryDirectory() as folder:
        ours = ["train_place.py", "@assets/default.args", "--max_train_steps", str(args.steps), "--logging_steps", "5"]
        ours += ["--output_dir", f"{folder}/student", "--overwrite_output_dir", "--validation_feature_extractor", ""]
        ours += ["--validation_shown_samples", "1", "--validation_num_inference_steps", "1", "--report_to", "none"]
        peer = ["benchmarks/peers.py", "--steps", str(args.steps), "--straight", f"{folder}/student"]
        pairs = [(measured(ours), measured(peer)) for _ in range(args.repeats)]
    for name, runs in (("train_place.py", [a for a, _ in pairs]), ("straight trainer", [b for _, b in pairs])):
        speeds, memories = zip(*runs, strict=True)
        print(
            f"{name:<18}{statistics.median(speeds):6.0f} images/s ({min(speeds):.0f} to {max(speeds):.0f})"
            f"{statistics.median(memories):8.2f} GiB"
        )
    ratios = [a[0] / b[0] for a, b in pairs]
    print(f"ratio of speeds, pair by pair: {json.dumps([round(ratio, 3) for ratio in ratios])}")


if __name__ == "__main__":
    main()
