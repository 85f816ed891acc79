# SPDX-License-Identifier: Apache-2.0
"""What each figure of an analysis says, in one sentence made from its numbers."""

import numpy as np

FIFTHS = ("cleanest", "second cleanest", "middle", "second noisiest", "noisiest")
NOTABLE = 1 / 3  # of an error: a coarse share worth a word
EVEN = 0.005  # how far a slope may be from 1 and still be called so


def coarse_fine_takeaway(analysis: dict) -> str:
    """Where on the schedule the error is, and where it is coarse; `analysis` as in analysis.json."""
    rows, last, name = analysis["places"], analysis["protocol"]["num_places"], analysis["protocol"]["place_name"]
    whole = sum(row["total"] for row in rows)
    if whole == 0:
        return "The student predicts what the teacher predicts."
    removed = analysis["mean"]["coarse_share"]
    said = f"A line an image and channel removes {removed:.0%} of the error"
    if len(rows) >= len(FIFTHS):
        by_fifth = np.zeros(len(FIFTHS))
        for row in rows:
            by_fifth[row["place"] * len(FIFTHS) // last] += row["total"] / whole
        most = int(by_fifth.argmax())
        said = f"{by_fifth[most]:.0%} of the error is in the {FIFTHS[most]} fifth of the {name}s; a line removes "
        said += f"{removed:.0%} of it all"
    shares = [row["coarse_share"] or 0.0 for row in rows]
    first = next((i for i in range(len(rows)) if min(shares[i:]) >= NOTABLE), None)
    if first is None:
        highest = int(np.argmax(shares))
        return f"{said}, and most at {name} {rows[highest]['place']}: {shares[highest]:.0%}."
    start = f"from {name} {rows[first]['place']} on" if first else "everywhere"
    return f"{said}, a third or more {start}."


def line_takeaway(analysis: dict) -> str:
    """Where the lines change the student's prediction most."""
    rows, name = analysis["places"], analysis["protocol"]["place_name"]
    furthest = max(rows, key=lambda row: abs(row["slope"]["median"] - 1))
    slope = furthest["slope"]["median"]
    if abs(slope - 1) < EVEN:
        return f"The median slope is within {EVEN:.1%} of 1, a perfect student's, at every {name}."
    verb = "shrink" if slope < 1 else "stretch"
    return (
        f"The lines {verb} the student's prediction most at {name} {furthest['place']}: "
        f"median slope {slope:.3f}, where 1 is perfect."
    )


def samples_takeaway(analysis: dict) -> str:
    """What correcting every prediction by its line changes in the samples; distances where they mean something."""
    samples = analysis["samples"]
    distances = {} if samples.get("warning") else samples.get("frechet_distance", {})
    if distances:
        student, corrected, teacher = (distances[who] for who in ("student", "corrected", "teacher"))
        said = f"Corrected by lines, the student's distance goes from {student:.4g} to {corrected:.4g}"
        if student <= teacher:
            return f"{said}; the teacher's is {teacher:.4g}."
        return f"{said}, {(student - corrected) / (student - teacher):.0%} of the way to the teacher's {teacher:.4g}."
    gaps = samples["pixel_difference_to_teacher"]
    student, corrected = gaps["student"], gaps["corrected"]
    if student == 0:
        return "The student draws what the teacher draws."
    way = "nearer to" if corrected <= student else "farther from"
    return (
        f"Corrected by lines, the student's samples are {abs(1 - corrected / student):.0%} {way} the teacher's: "
        f"a pixel differs by {corrected:.3g} of 255, not by {student:.3g}."
    )


def error_maps_takeaway(maps: dict[str, np.ndarray], place_name: str) -> str:
    """How unevenly the error is spread over the image, at the place of `maps` that has most of it."""
    errors = maps["mean_error"].reshape(len(maps["place"]), -1)
    most = int(errors.sum(axis=1).argmax())
    ordered = np.sort(errors[most])[::-1]
    if ordered.sum() == 0:
        return ""
    tenth = max(1, len(ordered) // 10)
    share, even = ordered[:tenth].sum() / ordered.sum(), tenth / len(ordered)
    said = f"At {place_name} {maps['place'][most]}, which has the largest error of these, "
    if share < 1.5 * even:
        return f"{said}it is spread nearly evenly: the worst {even:.0%} of the image hold {share:.0%} of it."
    return f"{said}the worst {even:.0%} of the image hold {share:.0%} of it, {share / even:.1f} times an even share."
