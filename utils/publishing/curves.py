# SPDX-License-Identifier: Apache-2.0
"""The loss curves of a run as a picture."""

import json
from pathlib import Path

LOSSES = ("loss", "task", "output", "coarse", "fine", "feature")
QUARTERS = {
    f"error_quarter_{i}": label for i, label in enumerate(("cleanest quarter", "second", "third", "noisiest"), 1)
}


def plot_losses(log: Path, picture: Path) -> None:
    """Draw `log.jsonl`: left every loss term, right the student's error by quarter of the noise schedule; log scales.
    Terms that are 0 throughout, as `coarse` is in the conventional losses, are left out."""
    import matplotlib  # here and not above: half a second that --help and a refused flag need not wait for
    from matplotlib.figure import Figure  # without pyplot nothing global is touched

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, names in ((left, {name: name for name in LOSSES}), (right, QUARTERS)):
            for name, label in names.items():
                points = [(line["step"], line[name]) for line in lines if line.get(name, 0) > 0]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "", lw=1.2, label=label)
            if axes.lines:
                axes.set_yscale("log")
                axes.legend()
            axes.set_xlabel("optimizer step")
        left.set_title("loss terms, means between logs", loc="left")
        right.set_title("squared error by timestep", loc="left")
        figure.savefig(picture, dpi=120)
