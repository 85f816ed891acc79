# SPDX-License-Identifier: Apache-2.0
"""`report.html`: all that is known of a student on one page that needs nothing else, neither network nor script.

The training scripts write it into `--output_dir`. What `evaluate_fid.py` and `analyze_error.py` find out about a
student is copied into `measured/` of its folder, and the page written again; of a model that the training scripts have
not made, the page lies beside what was measured.
"""

import base64
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from utils.counts import counted
from utils.distillation.equations import equations
from utils.files import read_json, write_file
from utils.publishing.card import card_facts, how_made, recipe
from utils.publishing.model_index import card_evaluation, reference_name, without_paths
from utils.publishing.readable import (
    SIZES,
    cost_rows,
    cost_sentence,
    distance,
    metric_rows,
    part,
    protocol_sentence,
    quantity,
    rounded,
    size_rows,
    validation_sentence,
)
from utils.publishing.records import measured_by, read_log

NAME, TEMPLATE = "report.html", "report_template.html"
MEASURED = "measured"  # in a student's folder: copies of what was measured of it
SHOWN_STEPS = 12  # grids over the training; more would make the page heavy, and tell no more
LARGEST_SIDE, LARGEST_PNG = 1280, 400_000  # pixels and bytes of an embedded picture
CAPTIONS = {  # of the figures of analyze_error.py, by name
    "coarse_fine.png": "Coarse and fine error along the schedule, and by group of similar error",
    "line.png": "Slope and intercept of the lines",
    "samples.png": "Samples from the same noise",
    "error_maps.png": "Where in the image",
}


def write_report(folder: Path, **measured: Path) -> Path:
    """The page of `folder`, that of a training run or of a measurement; its path. `measured` names the folders of an
    `evaluation` and an `analysis`, where they are not those in `measured/`."""
    facts, records = card_facts(folder), read_json(folder / "args.json")
    evaluation, analysis = (measured.get(name, folder / MEASURED / name) for name in ("evaluation", "analysis"))
    context = {
        "training": _training(folder, facts, without_paths(records)) if facts and records else None,
        "evaluation": _evaluation(evaluation, folder, SIZES if facts and facts.get("size") else ()),
        "analysis": _analysis(analysis, folder),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(title=folder.resolve().name, counted=counted, **context)
    write_file(folder / NAME, page)
    return folder / NAME


def report_measurement(model: str | None, output_dir: Path, kind: str, files: Sequence[str]) -> Path:
    """Write the page after an `evaluation` or `analysis`, whose `files` lie in `output_dir`: into the folder of
    `model` where a training script has made it, else into `output_dir`. The path of the page."""
    student = Path(model) if model else None
    if student and card_facts(student):
        try:
            kept = student / MEASURED / kind
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            for name in files:
                if (output_dir / name).is_file():
                    shutil.copyfile(output_dir / name, kept / name)
            return write_report(student)
        except PermissionError:  # a student that others keep
            pass
    return write_report(output_dir, **{kind: output_dir})


def _training(folder: Path, facts: dict, made_with: dict) -> dict[str, Any]:
    """What the page says of a training run."""
    args = made_with["arguments"]
    named = f"{args['pretrained_model_name_or_path']}"
    count, log = args["validation_num_samples"], read_log(folder)
    lines, total = equations(args, set().union(*log))
    steps = {line["step"]: line["frechet_distance"] for line in log if line.get("frechet_distance") is not None}
    return {
        "made": f"{how_made(args, facts, named)} on {args['dataset_name'] or args['train_data_dir']}",
        "args": args,
        "grids": _grids(folder / "samples", {step: distance(value, count) for step, value in steps.items()}),
        "num_grids": len(list((folder / "samples").glob("step-*.png"))),
        "samples": picture(folder / "samples.png"),
        "losses": picture(folder / "losses.png"),
        "size": size_rows(facts.get("size", {})),
        "sizes": facts["sizes"],
        "sampler": facts["sampler"],
        "distances": {who: distance(value, count) for who, value in facts["distances"].items()},
        "protocol": validation_sentence(args, facts["sampler"]).replace("`", ""),
        "equations": [*lines, total],
        "script": made_with["script"],
        "recipe": recipe(args),
        "versions": made_with["versions"],
    }


def _grids(folder: Path, distances: dict[int, str]) -> list[dict[str, Any]]:
    """The grid of each validation step with its distance; of many, some evenly spread from the first to the last."""
    paths = sorted(folder.glob("step-*.png"))
    if len(paths) > SHOWN_STEPS:
        paths = [paths[round(i * (len(paths) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    grids = []
    for path in paths:
        step = int(path.stem.removeprefix("step-"))
        grids.append({"step": step, "distance": distances.get(step), "picture": picture(path)})
    return [grid for grid in grids if grid["picture"]]


def _evaluation(measured: Path, folder: Path, without: Sequence[str]) -> dict[str, Any] | None:
    """What the page says of metrics.json in `measured`, but for the costs in `without`."""
    content = measured_by(measured / "metrics.json", folder)
    if not content:
        return None
    found = card_evaluation(content)
    protocol = found["protocol"]
    samples = part(protocol, "samples")
    return {
        **found,
        "of": samples.get("name") or samples.get("images"),
        "metrics": metric_rows(found),
        "sentence": protocol_sentence(protocol, reference_name(protocol, None)),
        "costs": cost_rows(found["cost"] or {}, found["compare_to"], without),
        "cost_sentence": cost_sentence(protocol),
        "whole_protocol": yaml_dump(protocol, sort_keys=False).strip(),
        "samples": picture(measured / "samples.png"),
    }


def _analysis(measured: Path, folder: Path) -> dict[str, Any] | None:
    """What the page says of analysis.json in `measured`."""
    content = without_paths(measured_by(measured / "analysis.json", folder))
    if not {"places", "samples"} <= content.keys():  # none, or one that was stopped, or of an older version
        return None
    protocol, samples, mean = content["protocol"], content["samples"], content["mean"]
    args, distances = protocol["arguments"], samples.get("frechet_distance", {})
    drawn = protocol["sampler"]
    sentence = f"{counted(samples['num_samples'], 'sample')} each from the same noise ({drawn['name']}, "
    sentence += counted(drawn["steps"], "step")
    sentence += f", seed {args['seed']})"
    if distances:
        sentence += f", against {counted(samples['num_real_images'], 'real image')} on the features of "
        sentence += samples["extractor"]["name"]
    return {
        "teacher": args["pretrained_model_name_or_path"],
        "images": counted(args["num_images"], "image"),
        "places": counted(len(content["places"]), protocol["place_name"]),
        "total": f"{mean['total']:.3g}",
        "share": f"{mean['coarse_share']:.1%}" if mean["coarse_share"] is not None else "none",
        "group_share": f"{mean['groups']['coarse_share']:.1%}"
        if mean["groups"]["coarse_share"] is not None
        else "none",
        "group_size": protocol["group_size"],
        "sentence": sentence,
        "warning": samples.get("warning"),
        "with_distance": bool(distances),
        "rows": [
            [who, quantity(rounded(gap)), *([distance(distances[who], samples["num_samples"])] if distances else [])]
            for who, gap in samples["pixel_difference_to_teacher"].items()
        ],
        "figures": [
            {"caption": caption, "picture": shown, "wide": name != "samples.png"}
            for name, caption in CAPTIONS.items()
            if (shown := picture(measured / name))
        ],
    }


def picture(path: Path) -> str | None:
    """A picture as a data URL, shrunk where it is large; None where there is none that can be read."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return None
    image.thumbnail((LARGEST_SIDE, 8 * LARGEST_SIDE))
    kind, content = "png", _encoded(image, "PNG", optimize=True)
    if len(content) > LARGEST_PNG:
        kind, content = "jpeg", _encoded(image.convert("RGB"), "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
