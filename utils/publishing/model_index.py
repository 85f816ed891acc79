# SPDX-License-Identifier: Apache-2.0
"""Metrics in the Hub's form, the `model-index` of a card's front matter; nothing in it names a folder of a machine."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from utils.publishing.readable import carried, part
from utils.publishing.readable import conditions as short_conditions

INCEPTION_NAMES = {"frechet_distance": "fid", "kernel_distance": "kid"}  # what the Hub calls them, of Inception alone
# keys under which the protocol in metrics.json names the real images
REFERENCES = ("dataset_name", "train_data_dir", "reference_images", "statistics")


def card_evaluation(content: dict) -> dict[str, Any]:
    """What a card says of metrics.json: the finite `metrics` and their `protocol`, the `cost`, both also of
    `compare_to`, which `compared` names, and `warnings`; without this machine's paths and without the flags and
    versions, which stay there."""
    content = without_paths(content)
    protocol = content.get("protocol", {})
    metrics, others = (
        {key: value for key, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
        for found in (content.get("metrics", {}), content.get("compare_to_metrics", {}))
    )
    return {
        **{key: content.get(key) for key in ("cost", "compare_to")},
        "compared": part(protocol, "arguments").get("compare_to"),
        "warnings": content.get("warnings", []),
        "metrics": metrics,
        "compare_to_metrics": others,
        "protocol": {k: v for k, v in protocol.items() if k not in ("arguments", "versions") and v is not None},
    }


def eval_results(
    evaluation: dict, task: str, data: str | None = None, conditions: dict | None = None
) -> list[EvalResult]:
    """The metrics of `card_evaluation` in the Hub's form, with what they may be compared with: `conditions`, as those
    of every metric. Without, the front matter is kept short: what decides most stands once, as the `args` of the data
    set, the numbers are rounded, and their errors are left out; the card's text and metrics.json have all of it.

    `data` names the real images where the protocol does not.
    """
    protocol, metrics = evaluation["protocol"], evaluation["metrics"]
    reference, name = part(protocol, "reference"), reference_name(protocol, data)
    if not conditions:
        metrics = carried(metrics, part(protocol, "samples").get("count"))
    inception = protocol.get("extractor") and protocol["extractor"].get("name") == "inception"
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w./-]", "-", name),
            dataset_name=name,
            dataset_config=reference.get("dataset_config_name"),
            dataset_split=reference.get("split"),
            dataset_args=None if conditions else short_conditions(protocol) or None,
            metric_type=INCEPTION_NAMES.get(metric, metric) if inception else metric,
            metric_name=metric if conditions else None,
            metric_args=conditions,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]


def reference_name(protocol: dict, data: str | None) -> str:
    """What the real images of a protocol are called: a folder's last part, or all of a Hub id; else `data`."""
    reference = part(protocol, "reference")
    name = next((reference[key] for key in REFERENCES if reference.get(key)), data) or "unknown"
    return Path(name).name if Path(name).exists() else name


def without_paths(value: Any) -> Any:
    """JSON with every absolute path cut to its last part: what is published names no folders of a machine."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
