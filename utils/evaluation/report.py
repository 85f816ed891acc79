# SPDX-License-Identifier: Apache-2.0
"""The numbers of an evaluation for people, for programs, and for the Hub."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from utils.command_line import ROOT, UsageError, bundled
from utils.commands import python, shell_line
from utils.counts import counted
from utils.files import read_json, write_json, written_beside
from utils.publishing.card import update_card
from utils.publishing.model_index import card_evaluation, eval_results
from utils.publishing.readable import LABELS, cost_rows

# what of a sampler's protocol another model must share for its numbers to compare
SAMPLING = (
    *("num_inference_steps", "scheduler", "clip_sample", "eta", "guidance_scale", "guidance_channels"),
    *("height", "width", "max_sequence_length", "class_labels", "prompts", "dtype", "seed"),
)


# flags of evaluate_fid.py that mean the same to analyze_error.py
SHARED_WITH_ANALYSIS = (
    *("dataset_name", "dataset_config_name", "train_data_dir", "split", "image_column", "crop"),
    *("image_interpolation_mode", "background", "skip_bad_images", "allow_pickle_weights", "cache_dir"),
    *("num_inference_steps", "guidance_scale", "guidance_channels", "prompts", "max_sequence_length", "seed"),
)
SHOWN = 8  # samples that analyze_error.py shows, and so the least that it draws


def report(content: dict) -> str:
    """What metrics.json holds, for people: counts, metrics, costs, warnings."""
    protocol, costs = content["protocol"], content.get("cost")
    known = protocol["reference"]["count"]
    references = counted(known, "reference image") if known else "an unknown number of reference images"
    lines = [f"{counted(protocol['samples']['count'], 'sample')}, {references}"]
    names = protocol["samples"].get("name"), protocol["arguments"]["compare_to"]
    compared = content.get("compare_to_metrics")
    lines.append(metrics_table(content["metrics"], protocol["extractor"], names, compared))
    if costs:
        lines += ["", cost_table(names[0], costs, names[1], content.get("compare_to"))]
    return "\n".join(lines + [f"Warning: {text}" for text in content["warnings"]])


def metrics_table(metrics: dict[str, float], extractor: dict, names: Sequence[str], other: dict | None = None) -> str:
    """One line a metric; with those of an `other` pipeline both, below their `names`."""
    inception = extractor["name"] == "inception"
    lines = [f"features of {extractor['name']} ({extractor['dimensions']} dimensions, {extractor['resize']})"]
    if other:
        lines.append(f"  {'':<52}" + "".join(f"{_end(name, 20):>22}" for name in names))
    for key, value in metrics.items():
        cells = f"{value:>22.6g}{other[key]:>22.6g}" if other else f"{value:>14.6g}"
        lines.append(f"  {LABELS[key][not inception]:<52}{cells}")
    return "\n".join(lines)


def cost_table(name: str, own: dict, other_name: str | None = None, other: dict | None = None) -> str:
    """One line a quantity; with another pipeline's, both and the ratio of the first to the second."""
    header = [name] if other is None else [name, other_name, "ratio"]
    lines = [f"  {'':<32}" + "".join(f"{_end(text, 20):>22}" for text in header)]
    for label, *cells in cost_rows(own, other):
        lines.append(f"  {label:<32}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _end(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]


def next_command(args, columns: Sequence[str], num_images: int | None, *, labelled: bool) -> str:
    """The command that says where the student's error lies: whole, where a teacher and its data are known. `columns`
    are those of the reference, which has `num_images`; `labelled`, whether samples are of classes."""
    student, teacher = args.pretrained_model_name_or_path, args.compare_to or _own_teacher(args)
    prompted = bool(args.prompts or args.caption_column)
    caption, label = args.caption_column or "text", args.label_column or "label"
    has_all = not (prompted and caption not in columns) and not (labelled and label not in columns)
    script = [python(), ROOT / "analyze_error.py"]
    if not (student and teacher and (args.dataset_name or args.train_data_dir) and has_all and _of_one_kind(args)):
        return f"Next: where a student's error lies\n    {shell_line([*script, '--help'])}"
    given = {
        "pretrained_model_name_or_path": teacher,
        "student_model_name_or_path": student,
        **{name: getattr(args, name) for name in SHARED_WITH_ANALYSIS},
        "caption_column": args.caption_column,
        "label_column": args.label_column,
        "num_images": min(256, num_images),
    }
    if "fid" in args.metrics and min(args.num_samples, num_images) >= SHOWN:
        given |= {"feature_extractor": args.feature_extractor, "inception_path": args.inception_path}
        given["num_samples"] = min(1024, args.num_samples)
    words = []
    for name, value in given.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(_from_anywhere, values)]
    command = shell_line([*script, *words, "--output_dir", "analysis"])
    return f"Next: where the student's error lies, in the folder analysis of the current one\n    {command}"


def _own_teacher(args) -> str | None:
    """That of a student which the training scripts have made, where it can be told from here."""
    made = read_json(Path(args.pretrained_model_name_or_path or "") / "args.json") or {}
    teacher = bundled(made.get("arguments", {}).get("pretrained_model_name_or_path") or "")
    return teacher if Path(teacher, "model_index.json").is_file() else None


def _of_one_kind(args) -> bool:
    """Whether `--compare_to` can be the teacher: a pipeline of the same class; one on the Hub is trusted to be."""
    names = (args.pretrained_model_name_or_path, args.compare_to or args.pretrained_model_name_or_path)
    indices = [read_json(Path(name) / "model_index.json") for name in names]
    return None in indices or indices[0]["_class_name"] == indices[1]["_class_name"]


def _from_anywhere(value: str | int | float) -> str:
    """A path here as it is from any folder."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else str(value)


def open_card(folder: Path) -> ModelCard:
    """The model card in `folder`, or an empty one. Raises UsageError where it cannot be read as a card."""
    path = folder / "README.md"
    try:
        return ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: diffusers\n---\n")
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"--update_model_card: {path} cannot be read as a model card: {error}") from error


def update_model_card(folder: Path, content: dict) -> Path:
    """Put the metrics of `content`, that of metrics.json, into the model card in `folder`, and metrics.json beside it.

    A card of the training scripts is written again by them, as long as nobody edited it. In any other card the numbers
    join the `model-index` of the front matter, where the same measurement is replaced; text and other entries stay.
    """
    path = folder / "README.md"
    write_json(folder / "metrics.json", content)
    if update_card(folder):
        return path
    card = open_card(folder)
    evaluation = card_evaluation(content)
    drawn = "text-to-image" if evaluation["protocol"]["samples"].get("prompts") else "unconditional-image-generation"
    task = card.data.get("pipeline_tag") or drawn
    results = eval_results(evaluation, task, conditions=_conditions(evaluation["protocol"]))
    present = card.data.eval_results or []
    kept = [old for old in present if not any(_same_measurement(old, new) for new in results)]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or folder.resolve().name
    with written_beside(path) as beside:
        card.save(beside)
    return path


def _same_measurement(old: EvalResult, new: EvalResult) -> bool:
    """Made under the same conditions; or the same number, in a form that the training scripts' card gave it."""
    number = (old.metric_type, old.dataset_name, old.metric_value)
    return new.is_equal_except_value(old) or number == (new.metric_type, new.dataset_name, new.metric_value)


def _conditions(protocol: dict) -> dict:
    """The part of a protocol that another model must share for its numbers to compare."""
    samples, reference, extractor = (protocol[name] for name in ("samples", "reference", "extractor"))
    conditions = {
        "num_samples": samples["count"],
        **{key: samples.get(key) for key in SAMPLING},
        "num_reference_images": reference["count"],
        "reference_resolution": reference.get("resolution"),
        "reference_crop": reference.get("crop"),
        "resolution": samples.get("resolution"),
        "interpolation": samples.get("interpolation"),
        "feature_extractor": f"{extractor['name']}, {extractor['kind']}, {extractor['resize']}",
    }
    return {key: value for key, value in conditions.items() if value is not None}
