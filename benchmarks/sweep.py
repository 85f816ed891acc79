# SPDX-License-Identifier: Apache-2.0
"""How small can I go: one student of each size, trained and measured alike, in one table and one plot.

    python benchmarks/sweep.py --ratios .3 .5 .7 .8                       # of the bundled teacher: a core, 40 minutes
    python benchmarks/sweep.py --ratios .3 .5 .7 .8 @my.args              # of your teacher, your data, your flags
    python benchmarks/sweep.py --presets bk_base bk_small bk_tiny @sd.args --evaluate --num_samples 5000 \\
        --prompts prompts.txt --guidance_scale 7.5
    python benchmarks/sweep.py --depths 14 7 4 @dit.args --script train_lift.py

All flags that are not listed below go to the training script, by `accelerate launch`; --evaluate and what stands
behind it goes to evaluate_fid.py, whose data, feature extractor, sampler and steps are otherwise those of the run's
own validation. Every size is tried with --dry_run before the first is trained. A size that is trained is not trained
again, one that was stopped goes on, one that is measured is left alone: after a crash, or to add a size, give the
command again. Writes sweep.json, sweep.md and sweep.png; the students, each a whole pipeline, are in the same folder.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.command_line import ArgumentParser, UsageError, bundled, run, start  # noqa: E402

TRAINING = ("train_place.py", "train_lift.py")
KINDS = {  # flag of this script -> (flag of the training script, type)
    "ratios": ("--pruning_ratio", float),
    "presets": ("--student_preset", str),
    "depths": ("--student_depth", int),
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(own flags, those of the training script). Raises UsageError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--evaluate") if "--evaluate" in argv else len(argv)
    parser = ArgumentParser(usage="%(prog)s --ratios X X ... [@recipe.args] [flags]", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ratios", nargs="+", help="--pruning_ratio of each student: .7 leaves 30 %% of the channels")
    which.add_argument("--presets", nargs="+", help="--student_preset of each")
    which.add_argument("--depths", nargs="+", help="--student_depth of each: transformer layers")
    parser.add_argument("--script", choices=TRAINING, default=TRAINING[0], help=f"(default: {TRAINING[0]})")
    parser.add_argument("--output_dir", type=Path, default=Path("sweep"), help="of everything (default: sweep)")
    parser.add_argument(
        "--evaluate", nargs=argparse.REMAINDER, default=[], help="flags of evaluate_fid.py, to the end"
    )
    own = [word for word in argv[:at] if not word.startswith("@")]
    recipes = [word for word in argv[:at] if word.startswith("@")]
    args, flags = parser.parse_known_args(own)
    args.evaluate, flags = argv[at + 1 :], [*recipes, *flags]
    kind = next(name for name in KINDS if getattr(args, name))
    args.flag, value_type = KINDS[kind]
    args.sizes = list(dict.fromkeys(getattr(args, kind)))
    for size in args.sizes:
        try:
            value_type(size)
        except ValueError as error:
            raise UsageError(f"--{kind} {size}: not a number. Write flags of the training behind @recipe.") from error
    for word in flags:
        name = word.partition("=")[0]
        if name in ("--student_config", "--student_model_name_or_path", *(each for each, _ in KINDS.values())):
            raise UsageError(f"{name}: the students' size is what --{kind} gives. Leave it out.")
    if not recipes and not any(word.startswith("--pretrained_model_name_or_path") for word in flags):
        flags = [f"@assets/default{'' if args.script == TRAINING[0] else '_lift'}.args", *flags]
    return args, flags


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ARGS, FLAGS = start(parse_args)

import train_lift  # noqa: E402
import train_place  # noqa: E402
from utils.evaluation.arguments import parse_args as parse_evaluation  # noqa: E402
from utils.files import read_json, write_file  # noqa: E402
from utils.metrics.extractors import load_extractor  # noqa: E402
from utils.training.arguments import parse_args as parse_training  # noqa: E402

SCRIPTS = dict(zip(TRAINING, (train_place, train_lift), strict=True))
COLUMNS = {  # key of metrics.json's cost -> (title, factor, digits)
    "parameters": ("parameters, M", 1e-6, 3),
    "macs_per_image": ("multiply-adds an image, G", 1e-9, 3),
    "seconds_per_image": ("seconds an image", 1, 4),
}


def launch(command: list[str], log: Path | None = None) -> None:
    """Run a command, its output on the screen, or in `log`.

    Raises:
        UsageError: it ended badly; with a log, what its last line says.
    """
    if log is None:
        code = subprocess.run(command).returncode
    else:
        with open(log, "w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        said = [line for line in log.read_text().splitlines() if ": error: " in line] if log else []
        raise UsageError(said[-1].split(": error: ", 1)[1] if said else f"exit code {code} of {shlex.join(command)}")


def measured(folder: Path, pipeline: str, args, training, flow: bool) -> list[str]:
    """Flags of evaluate_fid.py for a pipeline, the user's last."""
    flags = ["--pretrained_model_name_or_path", pipeline, "--output_dir", str(folder / "evaluation")]
    for name in ("dataset_name", "train_data_dir", "dataset_config_name", "image_column"):
        if value := getattr(training, name):
            flags += [f"--{name}", value]
    if training.dataset_name and (split := training.validation_split or training.train_split):
        flags += ["--split", split]
    flags += ["--num_samples", "5000", "--num_inference_steps", str(training.validation_num_inference_steps)]
    flags += ["--feature_extractor", training.validation_feature_extractor or "inception", "--metrics", "fid"]
    if training.validation_guidance_scale is not None:
        flags += ["--guidance_scale", str(training.validation_guidance_scale)]
    return [*flags, *([] if flow else ["--scheduler", "DDIMScheduler"]), *args.evaluate]


def is_flow(folder: Path) -> bool:
    """Of a pipeline here."""
    return "beta_start" not in read_json(folder / "scheduler" / "scheduler_config.json")


def sizes_table(rows: list[dict]) -> str:
    """Markdown, a line a pipeline, the teacher first; in brackets the share of the teacher's."""
    heads = ["size", *(title for title, _, _ in COLUMNS.values()), "distance"]
    lines, teacher = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"], rows[0]
    for row in rows:
        cells = [row["size"]]
        for key, (_, factor, digits) in COLUMNS.items():
            share = "" if row is teacher else f" ({row['cost'][key] / teacher['cost'][key]:.1%})"
            cells.append(f"{row['cost'][key] * factor:,.{digits}f}{share}")
        cells.append(f"{row['distance']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Distance over each cost; the teacher is the star."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12.5, 3.8), layout="constrained")
        for axes, (key, (title, factor, _)) in zip(
            figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS.items(), strict=True
        ):
            points = [(row["cost"][key] * factor, row["distance"]) for row in rows]
            students = sorted(points[1:])
            axes.plot(*zip(*students, strict=True), "o-", color="#0072B2")
            axes.plot(*points[0], "*", color="#D55E00", markersize=13)
            for row, point in zip(rows, points, strict=True):
                axes.annotate(row["size"], point, xytext=(5, 5), textcoords="offset points", fontsize=8)
            axes.set(xscale="log", yscale="log", xlabel=title)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
            axes.margins(0.18)
        figure.axes[0].set_ylabel("Frechet distance, lower is better")
        figure.savefig(path, dpi=110)


def main(args: argparse.Namespace, flags: list[str]) -> None:
    """Check all sizes, train, measure, report."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    names = {size: args.flag.removeprefix("--").replace("_", "-") + f"-{size}" for size in args.sizes}
    commands, method = {}, SCRIPTS[args.script].add_method_arguments
    for size, name in names.items():
        own = [args.flag, size, "--output_dir", str(args.output_dir / name), "--resume_from_checkpoint", "latest"]
        commands[size] = ["accelerate", "launch", str(ROOT / args.script), *flags, *own]
    training = [parse_training("", method, command[3:]) for command in commands.values()][0]
    teacher = training.pretrained_model_name_or_path
    if not teacher:
        raise UsageError("--pretrained_model_name_or_path: students of several sizes are made of a teacher. Name it.")
    evaluation = parse_evaluation("", measured(args.output_dir, teacher, args, training, flow=True))
    load_extractor(evaluation.feature_extractor, inception_path=evaluation.inception_path)  # refused now, or later

    state = args.output_dir / "sweep.json"
    kept = {"script": args.script, "flags": flags, "evaluate": args.evaluate, "rows": []}
    found = read_json(state) or kept
    for key in ("script", "flags", "evaluate"):
        if found[key] != kept[key]:
            raise UsageError(
                f"--output_dir {args.output_dir} holds a sweep with other flags ({key}: {found[key]} -> {kept[key]}). "
                "Choose another folder."
            )
    done = {row["size"]: row for row in found["rows"]}
    left = [size for size in args.sizes if names[size] not in done]
    for size in left:
        if not (args.output_dir / names[size] / "model_index.json").exists():
            print(f"checking {args.flag} {size}", flush=True)
            launch([*commands[size], "--dry_run"], args.output_dir / "dry_run.txt")

    def keep(name: str, folder: Path, pipeline: str, flow: bool) -> None:
        evaluation = measured(folder, pipeline, args, training, flow)
        launch([sys.executable, str(ROOT / "evaluate_fid.py"), *evaluation])
        content = read_json(folder / "evaluation" / "metrics.json")
        distance = content["metrics"]["frechet_distance"]
        done[name] = {"size": name, "distance": distance, "cost": content["cost"], "command": evaluation}
        write_file(state, json.dumps(kept | {"rows": [*done.values()]}, indent=1) + "\n")

    for size in left:
        folder = args.output_dir / names[size]
        if not (folder / "model_index.json").exists():
            launch(commands[size])
        keep(names[size], folder, str(folder), is_flow(folder))
    if "teacher" not in done:
        flow = is_flow(args.output_dir / names[args.sizes[0]])  # a student's scheduler is its teacher's
        keep("teacher", args.output_dir / "teacher", bundled(teacher), flow)

    rows = [done["teacher"], *(done[names[size]] for size in args.sizes)]
    lines = sizes_table(rows)
    write_file(args.output_dir / "sweep.md", lines + "\n")
    plot(rows, args.output_dir / "sweep.png")
    print(f"\n{lines}\n\nSaved: {args.output_dir / 'sweep.png'}, sweep.md and sweep.json")


if __name__ == "__main__":
    run(main, ARGS, FLAGS)
