# SPDX-License-Identifier: Apache-2.0
"""The rules that the Hugging Face Hub holds a model card's front matter to, as far as this project meets them."""

import re

import yaml

REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
LICENCES = {
    "apache-2.0",
    "mit",
    "openrail",
    "creativeml-openrail-m",
    "openrail++",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "other",
}
TASKS = {"unconditional-image-generation", "text-to-image"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}


def card_errors(card: str) -> list[str]:
    """What the Hub would refuse a card for."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["no YAML front matter"]
    several = {key: [data[key]] if isinstance(data[key], str) else data[key] for key in data}
    errors = [f"base_model {name!r}" for name in several.get("base_model", []) if not REPO_ID.fullmatch(name)]
    errors += [f"datasets {name!r}" for name in several.get("datasets", []) if not REPO_ID.fullmatch(name)]
    errors += [f"tags {tag!r}" for tag in several.get("tags", []) if not isinstance(tag, str)]
    errors += [f"license {name!r}" for name in several.get("license", []) if name not in LICENCES]
    for key, allowed in (("pipeline_tag", TASKS), ("base_model_relation", RELATIONS)):
        if key in data and data[key] not in allowed:
            errors.append(f"{key} {data[key]!r}")
    for i, model in enumerate(data.get("model-index", [])):
        for result in model["results"] if model.get("name") else [{}]:
            dataset, metrics = result.get("dataset", {}), result.get("metrics", [])
            whole = result.get("task", {}).get("type") and dataset.get("name") and metrics
            if not whole or not DATASET_TYPE.fullmatch(dataset.get("type", "")):
                errors.append(f"model-index[{i}]")
            errors += [
                f"metric {m}" for m in metrics if not m.get("type") or not isinstance(m.get("value"), int | float)
            ]
    return errors
