# SPDX-License-Identifier: Apache-2.0
"""What was measured of a student, and whether it is of the weights that lie there now."""

import json
from pathlib import Path
from typing import Any

from utils.files import sha256


def measured_by(record: Path, folder: Path) -> dict[str, Any]:
    """The content of metrics.json or analysis.json; {} where there is none, or it is of other weights than those in
    `folder`: a run that went on has made others since."""
    if not record.exists():
        return {}
    content = json.loads(record.read_text())
    protocol = content.get("protocol", {})
    samples = protocol.get("samples")
    known = protocol.get("student_sha256") or (samples.get("model_files") if isinstance(samples, dict) else None) or {}
    weights = {name: known[name] for name in known if name.endswith((".safetensors", ".bin"))}
    same = all(sha256(folder / name) == digest for name, digest in weights.items() if (folder / name).is_file())
    return content if same else {}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; none where there is no such file."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
