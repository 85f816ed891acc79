# SPDX-License-Identifier: Apache-2.0
"""How the settings of the embedded default were chosen: students trained alike but for a few flags, one distance each.

    python benchmarks/default_study.py --rows init --steps 1200 --seeds 0 1 --output study

Every row is a launch of train_place.py or train_lift.py on its embedded default with the row's flags; the distance is
the Frechet distance of --samples DDIM samples (25 steps, eta 0, the same noise for all) to the bundled test images on
the features of assets/classifier. Prints a table and writes results.json; rows that are there already are not run
again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.command_line import start  # noqa: E402

ROWS = {
    "init": {
        "taylor": "train_place.py --student_init taylor --grouping error",
        "magnitude": "train_place.py --student_init magnitude --grouping error",
        "random": "train_place.py --student_init random --grouping error",
    },
    "rate": {
        "taylor, 1e-3": "train_place.py --student_init taylor --learning_rate 1e-3 --grouping error",
        "taylor, 2e-3": "train_place.py --student_init taylor --learning_rate 2e-3 --grouping error",
        "taylor, 5e-3": "train_place.py --student_init taylor --learning_rate 5e-3 --grouping error",
        "random, 5e-3": "train_place.py --student_init random --learning_rate 5e-3 --grouping error",
    },
    "loss": {
        "w/o KD": "train_lift.py --lambda_kd_output 0",
        "OutKD mse": "train_lift.py --output_loss mse",
        "OutKD l1": "train_lift.py --output_loss l1",
        "LIFT": "train_lift.py",
        "PLACE": "train_place.py --grouping error",
        "PLACE signed": "train_place.py",
        "PLACE, no task": "train_place.py --lambda_task 0",
        "PLACE + FeatKD": "train_place.py --lambda_kd_feat 4.7e-5",
    },
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which tables (default: all)")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of every row (default: 1200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="runs per row (default: 0)")
    parser.add_argument("--samples", type=int, default=2048, help="images per distance (default: 2048)")
    parser.add_argument("--teacher", default="assets/teacher", help="teacher pipeline (default: assets/teacher)")
    parser.add_argument("--output", type=Path, default=Path("study"), help="where students and results go")
    return parser.parse_args()


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args)

import torch  # noqa: E402
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline  # noqa: E402

from utils.metrics.distances import frechet_distance  # noqa: E402
from utils.metrics.extractors import FeatureExtractor  # noqa: E402
from utils.metrics.statistics import FeatureStatistics  # noqa: E402
from utils.randomness import seed_from  # noqa: E402

BATCH = 128


def distance(folder: str, reference: FeatureStatistics, extractor: FeatureExtractor, samples: int) -> float:
    """Frechet distance of `samples` images of the pipeline in `folder`."""
    unet = DDPMPipeline.from_pretrained(folder)
    pipeline = DDIMPipeline(unet.unet.eval(), DDIMScheduler.from_config(unet.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    found = FeatureStatistics()
    for first in range(0, samples, BATCH):
        generators = [torch.Generator().manual_seed(seed_from(12345, i)) for i in range(first, first + BATCH)]
        images = pipeline(batch_size=BATCH, generator=generators, num_inference_steps=25, output_type="np").images
        found.update(extractor(torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)))
    return frechet_distance(reference.mean, reference.cov, found.mean, found.cov)


def test_statistics(extractor: FeatureExtractor) -> FeatureStatistics:
    """Features of the bundled test images."""
    import datasets
    import numpy as np

    rows = datasets.load_dataset(str(ROOT / "assets" / "fashion_mnist_16"), split="test")
    statistics_ = FeatureStatistics()
    for first in range(0, len(rows), 500):
        images = np.stack([np.array(image) for image in rows[first : first + 500]["image"]])
        statistics_.update(extractor(torch.from_numpy(images)[:, None]))
    return statistics_


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    extractor = FeatureExtractor(str(ROOT / "assets" / "classifier"))
    reference = test_statistics(extractor)
    for table in args.rows:
        for name, command in ROWS[table].items():
            for seed in args.seeds:
                done = results.setdefault(name, {"command": command, "distances": {}, "seconds": {}})
                if str(seed) in done["distances"]:
                    continue
                folder = args.output / f"{name}-{seed}".replace(" ", "_").replace("/", "").replace(",", "")
                script, *flags = command.split()
                recipe = "default.args" if script == "train_place.py" else "default_lift.args"
                flags = [f"@{ROOT / 'assets' / recipe}", "--seed", str(seed), *flags]
                flags += ["--max_train_steps", str(args.steps), "--pretrained_model_name_or_path", args.teacher]
                flags += ["--validation_shown_samples", "8", "--report_to", "none", "--overwrite_output_dir"]
                flags += ["--validation_feature_extractor", "", "--output_dir", str(folder)]
                start = time.perf_counter()
                subprocess.run([sys.executable, script, *flags], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
                done["seconds"][str(seed)] = time.perf_counter() - start
                done["distances"][str(seed)] = distance(str(folder), reference, extractor, args.samples)
                path.write_text(json.dumps(results, indent=1))
                print(f"{name:<20} seed {seed}: {done['distances'][str(seed)]:.2f}", flush=True)
    if "teacher" not in results:
        results["teacher"] = {"distances": {"0": distance(args.teacher, reference, extractor, args.samples)}}
        path.write_text(json.dumps(results, indent=1))
    print(f"\n{args.steps} steps, {args.samples} samples, seeds {args.seeds}\n\n| row | distance | lowest | highest |")
    print("|---|---|---|---|")
    for name, done in results.items():
        values = list(done["distances"].values())
        print(f"| {name} | {statistics.mean(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main(ARGS)
