# SPDX-License-Identifier: Apache-2.0
"""The numbers of an evaluation for people, for programs, and for the Hub."""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from utils.command_line import UsageError
from utils.files import write_json, written_beside
from utils.publishing.card import update_card
from utils.publishing.model_index import card_evaluation, eval_results
from utils.publishing.readable import LABELS, cost_rows

# what of a sampler's protocol another model must share for its numbers to compare
SAMPLING = (
    "num_inference_steps scheduler clip_sample eta guidance_scale height width class_labels prompts dtype seed".split()
)


def report(content: dict) -> str:
    """What metrics.json holds, for people: counts, metrics, costs, warnings."""
    protocol, costs = content["protocol"], content.get("cost")
    references = protocol["reference"]["count"] or "an unknown number of"
    lines = [f"{protocol['samples']['count']:,} samples, {references} reference images"]
    lines.append(metrics_table(content["metrics"], protocol["extractor"]))
    if costs:
        names = protocol["samples"]["name"], protocol["arguments"]["compare_to"]
        lines += ["", cost_table(names[0], costs, names[1], content.get("compare_to"))]
    return "\n".join(lines + [f"Warning: {text}" for text in content["warnings"]])


def metrics_table(metrics: dict[str, float], extractor: dict) -> str:
    """One line a metric."""
    inception = extractor["name"] == "inception"
    lines = [f"features of {extractor['name']} ({extractor['dimensions']} dimensions, {extractor['resize']})"]
    lines += [f"  {LABELS[key][not inception]:<52}{value:>14.6g}" for key, value in metrics.items()]
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
