# SPDX-License-Identifier: Apache-2.0
"""Text-to-image at CPU scale: a small student of a small Stable Diffusion teacher, one output loss beside the other.

    python benchmarks/make_text_teacher.py --help            # makes the teacher TEACHER and its dataset DATA
    python benchmarks/text_study.py --teacher TEACHER --data DATA

Every row trains the student of benchmarks/text_student.json, fresh, on the same cached latents for the same steps, and
draws the same samples: the Frechet distance of their features on assets/classifier to the 10,000 test images, and the
share that the classifier takes for what the prompt asked. Prints a table and saves a picture, a row each.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT))
from make_text_teacher import NOUNS, load_split  # noqa: E402

from utils.grids import image_grid  # noqa: E402
from utils.metrics.distances import frechet_distance  # noqa: E402
from utils.metrics.extractors import load_extractor  # noqa: E402
from utils.metrics.statistics import FeatureStatistics  # noqa: E402
from utils.randomness import seed_from  # noqa: E402

ROWS = {
    "without distillation": ("train_lift.py", ["--lambda_kd_output", "0"]),
    "OutKD (mse)": ("train_lift.py", ["--output_loss", "mse"]),
    "OutKD (l1)": ("train_lift.py", ["--output_loss", "l1"]),
    "PLACE": ("train_place.py", []),
}
STEPS, GUIDANCE, BATCH = 25, 3.0, 100  # of the sampler


def train(name: str, args) -> Path:
    """Run the script of a row, unless its student is there."""
    folder = args.output / name.replace(" ", "_").translate({ord("("): None, ord(")"): None})
    script, flags = ROWS[name]
    if not (folder / "model_index.json").exists():
        command = [sys.executable, script, "--pretrained_model_name_or_path", str(args.teacher), *flags]
        command += ["--dataset_name", str(args.data), "--student_config", "benchmarks/text_student.json"]
        command += ["--latent_cache_dir", str(args.output / "cache"), "--max_train_samples", str(args.images)]
        command += ["--max_train_steps", str(args.steps), "--train_batch_size", "64", "--learning_rate", "1e-3"]
        command += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "50", "--use_ema", "--ema_decay", "0.995"]
        command += ["--validation_shown_samples", "0", "--report_to", "none", "--seed", str(args.seed)]
        command += ["--output_dir", str(folder), "--overwrite_output_dir", *args.more]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


@torch.no_grad()
def draw(folder: Path, count: int) -> torch.Tensor:
    """`count` samples, uint8 (B, 3, H, W), prompts in turn; the same noise for every pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for first in tqdm(range(0, count, BATCH), desc="sampling", leave=False):
        numbers = range(first, min(first + BATCH, count))
        images = pipeline(
            [NOUNS[i % len(NOUNS)] for i in numbers],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed_from(0, 1, i)) for i in numbers],
            output_type="np",
        ).images
        parts.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="folder that make_text_teacher.py made")
    parser.add_argument("--data", type=Path, required=True, help="its dataset")
    parser.add_argument("--output", type=Path, default=Path("text_study"), help="students, cache, table, picture")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of a row (default: 2000)")
    parser.add_argument("--images", type=int, default=20_000, help="training images (default: 20000)")
    parser.add_argument("--samples", type=int, default=1000, help="drawn of each (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("more", nargs="*", help="further flags for every row, behind --")
    args = parser.parse_args()
    args.teacher, args.data, args.output = (path.resolve() for path in (args.teacher, args.data, args.output))
    args.output.mkdir(parents=True, exist_ok=True)

    extractor = load_extractor(str(ROOT / "assets" / "classifier"), with_probabilities=True)
    real = FeatureStatistics()
    for images in load_split(args.data, "test")[0].split(500):
        real.update(extractor(images))
    wanted = torch.arange(args.samples) % len(NOUNS)
    table, pictures = {}, {}
    for name in (*args.rows, "the teacher"):
        folder = args.teacher if name == "the teacher" else train(name, args)
        images = draw(folder, args.samples)
        own, right = FeatureStatistics(), []
        for i in range(0, args.samples, BATCH):
            features, probabilities = extractor.features_and_probabilities(images[i : i + BATCH])
            own.update(features)
            right.append(probabilities.argmax(1).cpu() == wanted[i : i + BATCH])
        distance = frechet_distance(real.mean, real.cov, own.mean, own.cov)
        table[name] = {"frechet_distance": distance, "accuracy": torch.cat(right).double().mean().item()}
        pictures[name] = images[: 2 * len(NOUNS)]
        print(f"{name:<22}{distance:>10.2f}{table[name]['accuracy']:>9.1%}", flush=True)
        (args.output / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    words = [NOUNS[i % len(NOUNS)] for i in range(2 * len(NOUNS))]
    image_grid(pictures, columns=words, per_line=len(words)).save(args.output / "samples.png")
    print(f"Saved {args.output / 'table.json'} and samples.png, a row each")


if __name__ == "__main__":
    main()
