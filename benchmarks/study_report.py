# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of benchmarks/study.py, from the JSON files alone."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from compare import draw, show_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import spearmanr
from study_rows import BASELINES, Family

from utils.files import read_json, write_file
from utils.flags import read_prompts_file

COLOURS = {"w/o KD": "0.4", "mse": "C0", "l1": "C2", "LIFT": "C4", "PLACE": "C1", "log": "C5"}
COMPARED = ("w/o KD", "w/o KD, balanced", "mse", "PLACE")  # what every row is compared with
SHOWN = 12  # lines of a plot that can still be told apart; beyond, PLACE's variants get a plot of their own


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, int]:
    """Mean of the differences over the seeds that both have, its standard error (nan below two), and their number."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.mean(differences) if differences else math.nan, error, len(differences)


def verdict(mean: float, error: float, count: int) -> str:
    """A cell: the difference, its standard error, and bold where it exceeds twice that; two seeds are too few to."""
    if not count:
        return ""
    text = f"{mean:+.2f}" if math.isnan(error) else f"{mean:+.2f} +- {error:.2f}"
    return f"**{text}**" if count > 2 and abs(mean) > 2 * error else text


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, lowest and highest."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def by_row(records: list[dict], setting: str) -> dict[str, list[dict]]:
    """Records of a setting by row, in the order in which they were run."""
    rows: dict[str, list[dict]] = {}
    for record in records:
        if record["setting"] == setting:
            rows.setdefault(record["row"], []).append(record)
    return rows


def table(rows: dict[str, list[dict]]) -> list[str]:
    """Markdown lines: distance, differences to the baselines that are there, precision, recall, what it cost; of
    latent rows the share of samples that are what was asked for."""
    distances = {
        name: {record["seed"]: record["metrics"]["frechet_distance"] for record in records}
        for name, records in rows.items()
    }
    baselines = [name for name in COMPARED if name in rows]
    shares = [key for key in ("precision", "recall", "as_asked") if key in next(iter(rows.values()))[0]["metrics"]]
    heads = ["row", "distance", *(f"minus {name}" for name in baselines)]
    heads += [*(share.replace("_", " ") for share in shares), "seeds", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, records in sorted(rows.items(), key=lambda pair: statistics.mean(distances[pair[0]].values())):
        cells = [name, spread([*distances[name].values()])]
        cells += ["" if base == name else verdict(*paired(distances[name], distances[base])) for base in baselines]
        cells += [spread([record["metrics"][key] for record in records], 3) for key in shares]
        cells += [str(len(records)), f"{statistics.mean(sum(r['cpu_seconds'].values()) for r in records):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def style(name: str) -> dict:
    """A row's colour is its loss; dashed is balanced, dotted another variant."""
    loss = next((loss for loss in COLOURS if name.startswith(loss)), None)
    line = "-" if name in COLOURS else "--" if "balanced" in name or "P = " in name else ":"
    return {"color": COLOURS.get(loss, "k"), "linestyle": line}


def draw_distances(axes: Axes, rows: dict[str, list[dict]], looks: dict[str, dict], title: str) -> list[str]:
    """A line a row, best first: a dot a seed, a bar at their mean. The rows in that order."""
    distances = {name: [record["metrics"]["frechet_distance"] for record in records] for name, records in rows.items()}
    order = sorted(distances, key=lambda name: statistics.mean(distances[name]))
    for place, name in enumerate(order):
        colour = looks[name]["color"]
        axes.plot(distances[name], [place] * len(distances[name]), "o", color=colour, alpha=0.7)
        axes.plot(statistics.mean(distances[name]), place, "|", color=colour, ms=16, mew=2)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    lowest, highest = (end(map(end, distances.values())) for end in (min, max))
    wide = highest > 3 * lowest
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.grid(axis="x", which="both", lw=0.3)
    axes.set_xlabel(f"Frechet distance, a dot a seed{' (log scale)' * wide}")
    axes.set_title(title, loc="left", fontsize=10)
    return order


def pictures_of(rows: dict[str, list[dict]]) -> dict[str, dict[str, list[dict]]]:
    """The rows of each plot of a setting, by what its title adds."""
    if len(rows) <= SHOWN:
        return {"": rows}
    variants = [name for name in rows if name.startswith("PLACE, ") and name not in BASELINES]
    own = {name: rows[name] for name in ("PLACE", "PLACE, balanced", *variants)}
    return {"": {name: row for name, row in rows.items() if name not in variants}, ", variants of PLACE": own}


def plot(rows: dict[str, list[dict]], title: str, picture: Path, *, by_loss: bool = True) -> None:
    """Distances; and along the schedule the error at the end and the share of the gradient's norm at start and end.
    Colours are those of `style`, or with `by_loss` false a row's own."""
    looks = {name: style(name) for name in rows}
    if not by_loss:
        looks = {name: {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10]} for i, name in enumerate(rows)}
    figure = Figure(figsize=(16, 1.6 + 0.32 * max(len(rows), 9)), layout="constrained")
    dots, error, start, end = figure.subplots(1, 4, width_ratios=(1.3, 1, 1, 1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for name in draw_distances(dots, rows, looks, "distance of the samples"):
        curves = ((error, "end", "error_to_teacher"), (start, "start", "gradient_norm"), (end, "end", "gradient_norm"))
        for axes, when, what in curves:
            bins = zip(*(record["probe"][when][what] for record in rows[name]), strict=True)
            means = [statistics.mean(values) for values in bins]
            whole = sum(means) if what == "gradient_norm" else 1
            middles = [(number + 0.5) * 1000 / len(means) for number in range(len(means))]
            axes.plot(middles, [mean / whole for mean in means], lw=1.2, label=name, **looks[name])
    for axes, name, unit in (
        (error, "error to the teacher, end", "mean squared error"),
        (start, "gradient, start", "share of its norm"),
        (end, "gradient, end", "share of its norm"),
    ):
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel(unit)
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_xlabel("place in the schedule (0 is the cleanest)")
        axes.set_yscale("log")
        if axes is not error:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_minor_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*error.get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(picture, dpi=110)


def draw_samples(students: dict[str, str], family: Family, title: str, picture: Path, count: int = 12) -> None:
    """A row of samples from the same noise of each pipeline (name -> folder), 25 steps, named at its left."""
    prompts = read_prompts_file(family.prompts) if family.prompts else None
    options = {"scheduler": family.scheduler, "guidance_scale": family.guidance_scale, "prompts": prompts}
    options |= {"class_labels": family.class_labels, "num_inference_steps": 25}
    options |= {"max_sequence_length": family.max_sequence_length}
    samples = {name: draw(folder, "--work", count, **options)[0] for name, folder in students.items()}
    figure = Figure(figsize=(1.8 + 0.55 * count, 0.4 + 0.55 * len(students)), layout="constrained")
    show_rows(figure, samples, title)
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def why(records: list[dict]) -> str:
    """What a student's distance goes with: Spearman's rank correlation, over all rows and seeds, with its error to
    the teacher in parts of the schedule."""
    distances = [record["metrics"]["frechet_distance"] for record in records]
    errors = np.array([record["probe"]["end"]["error_to_teacher"] for record in records])  # (students, bins)

    def rank(values: np.ndarray) -> str:
        return f"{spearmanr(values, distances).statistic:.2f}"

    fifths = np.split(np.log(errors), 5, axis=1)
    return (
        f"Rank correlation of the distance, over these {len(records)} students, with the error to the teacher at the "
        f"end: mean over the schedule {rank(errors.mean(1))}, mean of its logarithm {rank(np.log(errors).mean(1))}; "
        f"by fifth of the schedule, the cleanest first, {', '.join(rank(part.mean(1)) for part in fifths)}."
    )


def rounding_table(records: list[dict], others: list[dict]) -> list[str]:
    """Rows that were run on a second processor too, with the same command and seed: they differ by rounding alone."""
    lines = ["| row, setting, seed | processor: distance | another |", "|---|---|---|"]
    for other in others:
        key = {name: other[name] for name in ("row", "setting", "seed")}
        if own := next((record for record in records if key.items() <= record.items()), None):
            cells = [f"{each['cpu']}: {each['metrics']['frechet_distance']:.2f}" for each in (own, other)]
            lines.append(f"| {', '.join(map(str, key.values()))} | {' | '.join(cells)} |")
    return lines


def tuning_table(records: list[dict]) -> list[str]:
    """What every method's grid gave, the chosen one bold."""
    lines = ["| setting | row | rate and weight: distance on held-out training images |", "|---|---|---|"]
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["setting"], record["row"]), []).append(record)
    for (setting, row), tried in groups.items():
        best = min(record["metrics"]["frechet_distance"] for record in tried)
        cells = []
        for record in tried:
            distance = record["metrics"]["frechet_distance"]
            cell = f"{', '.join(record['tuned'].values())}: {distance:.1f}"
            cells.append(f"**{cell}**" if distance == best else cell)
        lines.append(f"| {setting} | {row} | {'; '.join(cells)} |")
    return lines


def report(folder: Path, settings: dict) -> None:
    """Write `README.md` and a picture per setting beside the JSON files of `folder`; `settings` gives their titles."""
    lines = ["# The study", "", "Written by `python benchmarks/study.py --report` from the JSON files beside it.", ""]
    lines += [
        "Frechet distances on `assets/classifier`; lower is better, and fewer samples are further away. A difference",
        "is the mean over the seeds that both rows have, +- its standard error, bold where it exceeds twice that over",
        "three seeds or more.",
    ]
    for record in read_json(folder / "references.json") or []:
        metrics = record["metrics"]
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in metrics.items())
        lines += ["", f"{record['row']}: {shown}"]
    records = [
        {**record, "stage": path.stem} for path in sorted(folder.glob("stage_*.json")) for record in read_json(path)
    ]
    for setting, spec in settings.items():
        rows = by_row(records, setting)
        if rows:
            title = f"{spec.title}, {spec.steps:,} steps, {spec.family.samples:,} samples"
            lines += ["", f"## {title}", "", *table(rows)]
            if len(students := sum(rows.values(), [])) > 9:
                lines += ["", why(students)]
            for more, shown in pictures_of(rows).items():
                picture = f"{setting}{'_place' if more else ''}.png"
                plot(shown, title + more, folder / picture, by_loss=not more)
                lines += ["", f"![{spec.title}{more}]({picture})"]
            if (folder / f"{setting}_samples.png").exists():
                lines += ["", f"![Samples]({setting}_samples.png)"]
    if others := read_json(folder / "rounding.json"):
        lines += ["", "## What rounding does", "", *rounding_table(records, others)]
    if tuning := read_json(folder / "tuning.json"):
        lines += ["", "## Tuning", "", *tuning_table(tuning)]
    machines = sorted({json.dumps([record["cpu"], record["commit"], record["versions"]]) for record in records})
    lines += ["", "## Machines", ""]
    for cpu, commit, packages in map(json.loads, machines):
        lines += [f"- {cpu}, commit {commit}, {', '.join(f'{name} {version}' for name, version in packages.items())}"]
    write_file(folder / "README.md", "\n".join(lines) + "\n")
