# SPDX-License-Identifier: Apache-2.0
"""Set several training runs side by side: loss terms, distances, and samples from the same noise.

    python benchmarks/compare.py student_mse student_place                 # two output folders of the training scripts
    python benchmarks/compare.py runs/*/ --samples 12 --output comparison  # as many as a picture has room for
    python benchmarks/compare.py a b --prompts prompts.txt --guidance_scale 3        # text-to-image students

Reads each folder's log.jsonl, args.json and, where evaluate_fid.py has left its metrics.json in the folder or in its
`evaluation`, that; draws a few samples of each student, and of their teacher if all have the same. Writes
comparison.png, with a panel for every loss term and a row of samples for every run, and comparison.md: the flags in
which the runs differ, how each ended, its distance. Losses of different methods are not the same quantity; `task` is,
where neither --snr_gamma nor --task_balance weighs it, and the distance.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.command_line import ArgumentParser, UsageError, bundled, run, without_root  # noqa: E402
from utils.files import read_json, write_file  # noqa: E402
from utils.flags import check_positive, read_prompts_file  # noqa: E402

TERMS = {  # key in log.jsonl -> title of its panel
    "loss": "loss",
    "task": "task: error to the data",
    "output": "output: distillation",
    "coarse": "its coarse part",
    "fine": "its fine part",
    "feature": "features",
    "frechet_distance": "distance in validation",
}
# flags that say where a run lies, and nothing about it
ELSEWHERE = {"output_dir", "overwrite_output_dir", "latent_cache_dir", "resume_from_checkpoint", "dry_run"}


class Run:
    """What a training script has left in a folder."""

    def __init__(self, folder: Path):
        """Raises UsageError where it has not finished there, or no training script has run."""
        self.folder, self.name = folder, folder.resolve().name
        needed = {name: folder / name for name in ("log.jsonl", "args.json", "model_index.json")}
        if missing := [name for name, path in needed.items() if not path.is_file()]:
            raise UsageError(
                f"{folder} has no {' and no '.join(missing)}: it is not the --output_dir of a run of train_lift.py or "
                "train_place.py that has come to its end. Name such folders."
            )
        try:
            self.log = [json.loads(line) for line in needed["log.jsonl"].read_text().splitlines()]
        except ValueError as error:
            raise UsageError(f"{needed['log.jsonl']} cannot be read: {error}. Leave {folder} out.") from error
        content = read_json(needed["args.json"])
        if not self.log or not isinstance(content, dict) or "arguments" not in content:
            raise UsageError(f"{folder}: its log.jsonl or args.json is empty or damaged. Leave it out.")
        arguments = {name: without_root(value) for name, value in content["arguments"].items()}
        self.settings = {"script": content["script"], **arguments}
        self.teacher = self.settings.get("pretrained_model_name_or_path")

    def curve(self, term: str) -> list[tuple[int, float]]:
        """(step, value) of a term; one that is off is logged as zero."""
        return [(line["step"], line[term]) for line in self.log if line.get(term)]

    def distance(self) -> tuple[float, str] | None:
        """The Frechet distance and where it is from; of evaluate_fid.py before that of the run's own validation."""
        for path in (self.folder / "metrics.json", self.folder / "evaluation" / "metrics.json"):
            if value := ((read_json(path) or {}).get("metrics") or {}).get("frechet_distance"):
                return value, f"{path.relative_to(self.folder)}"
        points = self.curve("frechet_distance")
        return (points[-1][1], "its validation") if points else None


def differences(runs: list[Run]) -> list[str]:
    """Names of the flags in which the runs differ."""
    names = dict.fromkeys(name for each in runs for name in each.settings if name not in ELSEWHERE)
    return [name for name in names if len({json.dumps(each.settings.get(name)) for each in runs}) > 1]


def table(runs: list[Run], parameters: dict[str, int]) -> str:
    """Markdown, a line a run; `parameters` is by name of a run."""
    differing, distances = differences(runs), [each.distance() for each in runs]
    terms = [term for term in TERMS if term != "frechet_distance" and any(each.curve(term) for each in runs)]
    heads = ["run", "parameters", "steps", *terms, "distance", "of", *(f"--{name}" for name in differing)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for each, found in zip(runs, distances, strict=True):
        last = [f"{curve[-1][1]:.4g}" if (curve := each.curve(term)) else "" for term in terms]
        distance = (f"{found[0]:.2f}", found[1]) if found else ("", "")
        values = ("" if (value := each.settings.get(name)) is None else str(value) for name in differing)
        cells = [each.name, f"{parameters[each.name]:,}", str(each.log[-1]["step"]), *last, *distance, *values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(name: str, flag: str, count: int, *, scheduler: str | None = None, **options):
    """(`count` uint8 samples (B, C, H, W), parameters of the denoiser) of a pipeline, which `flag` names; `options`
    are those of `Sampler`. Raises UsageError."""
    import torch

    from utils.evaluation.pipelines import denoiser_of, load_pipeline, pipeline_folder, use_scheduler
    from utils.evaluation.sampler import Sampler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(pipeline_folder(name, flag), flag, dtype=torch.float32, device=device)
    if scheduler or "beta_start" in pipeline.scheduler.config:  # as the validation of the training scripts
        use_scheduler(pipeline, scheduler or "DDIMScheduler")
    images = Sampler(pipeline, **options)(range(count))
    return images, sum(p.numel() for p in denoiser_of(pipeline).parameters())


def show_rows(figure, samples: dict, title: str) -> None:
    """A row of `samples` (name -> uint8 (B, C, H, W)) for each name, named at its left."""
    from utils.grids import image_grid

    rows = figure.subplots(len(samples), 1, squeeze=False).flatten()
    for axes, (name, images) in zip(rows, samples.items(), strict=True):
        axes.imshow(image_grid({"": images}, per_line=len(images)), cmap="gray", vmin=0, vmax=255)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    rows[0].set_title(title, loc="left", fontsize=10)


def picture(runs: list[Run], samples: dict, path: Path) -> None:
    """Panels of the terms above, rows of samples below."""
    import matplotlib
    from matplotlib.figure import Figure

    terms = [term for term in TERMS if any(each.curve(term) for each in runs)]
    columns = min(4, len(terms))
    rows = -(-len(terms) // columns)
    count = len(next(iter(samples.values())))
    height = 12.5 / count  # inches of a row of samples that fills the width
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(14, 2.8 * rows + (height + 0.1) * len(samples) + 0.4), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[2.8 * rows, (height + 0.1) * len(samples) + 0.4])
        panels = above.subplots(rows, columns, squeeze=False).flatten()
        for axes, term in zip(panels, terms, strict=False):
            for place, each in enumerate(runs):
                if points := each.curve(term):
                    marker = "." if len(points) < 20 else ""
                    axes.plot(*zip(*points, strict=True), marker=marker, lw=1.2, color=f"C{place}", label=each.name)
            if axes.dataLim.y0 > 0:  # the logarithm of an error may be below zero
                axes.set_yscale("log")
            for level in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                level("{x:g}")
            axes.set_title(TERMS[term], loc="left", fontsize=10)
            axes.set_xlabel("optimizer step")
        for axes in panels[len(terms) :]:
            axes.remove()
        handles = {label: line for axes in panels[: len(terms)] for line in axes.lines for label in [line.get_label()]}
        above.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=min(6, len(runs)), fontsize=9)
        show_rows(below, samples, "samples, each column from the same noise")
        figure.savefig(path, dpi=110, bbox_inches="tight")


def parse_args(argv: list[str] | None = None):
    """Raises UsageError: a flag, a folder or a number that cannot be."""
    parser = ArgumentParser(usage="%(prog)s DIR DIR ... [flags]", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output folders of the training scripts")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="picture and table (comparison)")
    parser.add_argument("--samples", type=int, default=10, help="of each run, the same noise for all (default: 10)")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="sampler steps (default: 25)")
    parser.add_argument("--scheduler", help="of diffusers (default: DDIMScheduler, for flows the pipeline's own)")
    parser.add_argument("--guidance_scale", type=float, help="where the pipelines take it (default: their own)")
    parser.add_argument("--class_labels", type=int, nargs="+", help="in turn (default: all classes)")
    parser.add_argument("--prompts", metavar="FILE", help="text-to-image: one prompt a line, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    args = parser.parse_args(argv)
    check_positive(args, "samples num_inference_steps")
    if len(args.folders) < 2:
        raise UsageError(f"{args.folders[0]} alone is nothing to compare. Name two folders or more.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read all runs, draw, write."""
    args = parse_args(argv)
    runs = [Run(folder) for folder in dict.fromkeys(args.folders)]
    folder_names = [each.name for each in runs]
    for each in runs:
        if folder_names.count(each.name) > 1:  # two folders of one name in different places
            each.name = str(each.folder)
    prompts = read_prompts_file(args.prompts) if args.prompts else None
    names = ("num_inference_steps", "scheduler", "guidance_scale", "class_labels", "seed")
    options = {"prompts": prompts, **{name: getattr(args, name) for name in names}}
    samples, parameters, teachers = {}, {}, {each.teacher for each in runs}
    if len(teachers) == 1 and (teacher := teachers.pop()):
        samples["their teacher"], _ = draw(bundled(teacher), "the runs' teacher", args.samples, **options)
    for each in runs:
        samples[each.name], parameters[each.name] = draw(str(each.folder), "DIR", args.samples, **options)
    args.output.mkdir(parents=True, exist_ok=True)
    picture(runs, samples, args.output / "comparison.png")
    lines = table(runs, parameters)
    write_file(args.output / "comparison.md", lines + "\n")
    print(f"{lines}\n\nSaved: {args.output / 'comparison.png'} and comparison.md")


if __name__ == "__main__":
    run(main)
