# SPDX-License-Identifier: Apache-2.0
"""What `analyze_error.py` leaves and prints: the figures by name, and the table."""

import json
import re
from pathlib import Path

from torch import Tensor

from utils.analysis.arguments import PROBES
from utils.analysis.figures import coarse_fine_figure, error_maps_figure, line_figure
from utils.analysis.takeaways import coarse_fine_takeaway, error_maps_takeaway, line_takeaway, samples_takeaway
from utils.counts import counted
from utils.files import sha256, write_file
from utils.grids import image_grid, writable

MAPS_FILE = "error_maps.npz"
FIGURES = ("coarse_fine.png", "line.png", "samples.png", "error_maps.png")


def save_analysis(analysis: dict, folder: Path) -> None:
    """Write `analysis.json`; a list of numbers is one line, however long."""
    text = json.dumps(analysis, indent=1, allow_nan=False)
    text = re.sub(r"\[\n[-+\d.e,\s]+\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
    write_file(folder / "analysis.json", text + "\n")


def weight_hashes(name_or_path: str, component: str) -> dict[str, str] | None:
    """SHA-256 of a denoiser's weight files, in a folder of its own or its `component` of a pipeline's, by their path
    there; None for a name on the Hub."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return None
    files = [
        path for path in (*folder.glob("*"), *folder.glob(f"{component}/*")) if path.suffix in (".safetensors", ".bin")
    ]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}


def save_figures(analysis: dict, maps: dict, samples: dict[str, Tensor], folder: Path) -> None:
    """All of `FIGURES`, each with what it says above it: `analysis` as in analysis.json, `maps` as in error_maps.npz,
    `samples` uint8 (B, C, H, W) of everyone who drew some, from the same noise."""
    # few samples have a distance far above that of many: the table says so beside the numbers, a picture could not
    distances = {} if analysis["samples"].get("warning") else analysis["samples"].get("frechet_distance", {})
    rows = {who + (f"\nFrechet {distances[who]:.2f}" if distances else ""): images for who, images in samples.items()}
    words, protocol = writable(analysis["samples"].get("shown", [])), analysis["protocol"]
    coarse_fine_figure(analysis, folder / FIGURES[0], coarse_fine_takeaway(analysis))
    line_figure(analysis, folder / FIGURES[1], line_takeaway(analysis))
    drawn = f"{protocol['sampler']['name']}, {counted(protocol['sampler']['steps'], 'step')}, the same noise for all"
    image_grid(rows, columns=words, title=f"{samples_takeaway(analysis)}\n{drawn}").save(folder / FIGURES[2])
    error_maps_figure(maps, protocol, folder / FIGURES[3], error_maps_takeaway(maps, protocol["place_name"]))


def error_table(analysis: dict) -> str:
    """The split by place of the schedule, and what correcting it brings."""

    def line(name, row: dict) -> str:
        parts = "".join(f"{row[part]:11.3e}" if part in row else " " * 11 for part in ("total", "coarse", "fine"))
        shares = [part["coarse_share"] for part in (row, row["groups"])]
        shares = "".join("        -" if value is None else f"{value:9.1%}" for value in shares)
        medians = "".join(f"{row[key]['median']:11.4f}" for key in ("slope", "intercept") if key in row)
        return f"{name:>8}{parts}{shares}{medians}"

    samples = analysis["samples"]
    distances = samples.get("frechet_distance", {})
    group, place_name = f"{analysis['protocol']['group_size']} each", analysis["protocol"]["place_name"]
    lines = [
        f"{'':8}{'mean squared error':^33}{'coarse share, line':>19}{'median over lines':>21}",
        f"{place_name:>8}{'total':>11}{'coarse':>11}{'fine':>11}{'channel':>9}{group:>9}{'slope':>11}{'intercept':>11}",
        *(line(row["place"], row) for row in analysis["places"]),
        line("mean", analysis["mean"]),
        line("chance", analysis["chance"]),
        "",
        f"{counted(samples['num_samples'], 'sample')} each, from the same noise",
        f"{'':12}{'pixels from the teacher (of 255)':>36}" + ("Frechet distance".rjust(20) if distances else ""),
    ]
    lines.append(f"corrected by lines {PROBES[samples['probe']]} (--probe {samples['probe']})")
    for who, gap in samples["pixel_difference_to_teacher"].items():
        lines.append(f"{who:<12}{gap:36.2f}" + (f"{distances[who]:20.2f}" if distances else ""))
    if samples.get("warning"):
        lines.append(samples["warning"])
    return "\n".join(lines)
