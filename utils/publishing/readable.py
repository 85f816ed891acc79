# SPDX-License-Identifier: Apache-2.0
"""Numbers and protocols for people: named, rounded to what they carry, and never one without the other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.counts import counted

LABELS = {  # key in metrics.json -> (with Inception features, with others), each with what is better
    "frechet_distance": ("FID, lower is better", "Frechet distance, lower is better"),
    "kernel_distance": ("KID, lower is better", "kernel distance, lower is better"),
    "kernel_distance_stderr": ("  its standard error over subsets",) * 2,
    "precision": ("precision, of 1", "precision, of 1"),
    "recall": ("recall, of 1", "recall, of 1"),
    "inception_score": ("Inception Score, higher is better", "Inception Score of this classifier, higher is better"),
    "inception_score_std": ("  its standard deviation over splits",) * 2,
    "clip_score": ("CLIP score, higher is better",) * 2,
}
ERRORS = {"kernel_distance": "kernel_distance_stderr", "inception_score": "inception_score_std"}
COSTS = {  # key in metrics.json -> (label, factor, unit)
    "parameters": ("parameters of the denoiser", 1, ""),
    "parameters_of_pipeline": ("parameters of the pipeline", 1, ""),
    "size_on_disk_bytes": ("size on disk", 2**-20, "MiB"),
    "stored_as": ("  of weights in", 1, ""),
    "macs_per_forward": ("multiply-adds a forward", 1e-6, "M"),
    "forwards_per_image": ("forwards an image", 1, ""),
    "macs_per_image": ("multiply-adds an image", 1e-6, "M"),
    "seconds_per_image": ("seconds an image, a process", 1, "s"),
    "images_per_second": ("images a second, all processes", 1, ""),
    "peak_memory_bytes": ("memory above the idle process", 2**-20, "MiB"),
}
MANY = 10_000  # samples; with fewer a distance differs from seed to seed in its third digit already


def rounded(value: float, digits: int = 3) -> float:
    """To so many digits that count."""
    return float(f"{value:.{digits}g}")


def distance(value: float, num_samples: int) -> str:
    """A feature distance of so many samples, to what it carries."""
    return f"{rounded(value, 3 if num_samples < MANY else 4):,.10g}"


def carried(metrics: Mapping[str, float], num_samples: int | None) -> dict[str, float]:
    """Metrics to what they carry: to the second digit of their error where that is known, else by the number of
    samples. The errors themselves are left out."""
    few, found = (num_samples or 0) < MANY, {}
    for name, value in metrics.items():
        error = metrics.get(ERRORS.get(name, ""), 0)
        if name in ERRORS.values():
            continue
        if error > 0:
            found[name] = round(value, _decimals(error))
        elif name in ("precision", "recall"):
            found[name] = round(value, 2 if few else 3)
        else:
            found[name] = rounded(value, 3 if few else 4)
    return found


def _decimals(error: float) -> int:
    """At which `error` shows two digits."""
    return max(0, 1 - math.floor(math.log10(error)))


def metric_rows(evaluation: Mapping[str, dict]) -> list[list[str]]:
    """[what it is, its value and error] for each of the `metrics` of `card_evaluation`, and those of `--compare_to`
    behind them where they were measured."""
    protocol, others = evaluation["protocol"], evaluation.get("compare_to_metrics")
    inception, count = part(protocol, "extractor").get("name") == "inception", part(protocol, "samples").get("count")
    own, other = (_with_errors(metrics or {}, count) for metrics in (evaluation["metrics"], others))
    return [
        [LABELS[name][not inception] if name in LABELS else name, text, *([other.get(name, "-")] if other else [])]
        for name, text in own.items()
    ]


def _with_errors(metrics: Mapping[str, float], count: int | None) -> dict[str, str]:
    found = {}
    for name, value in carried(metrics, count).items():
        error = metrics.get(ERRORS.get(name, ""), 0)
        exact = f"{value:.{_decimals(error)}f} +- {error:.{_decimals(error)}f}" if error > 0 else f"{value:.10g}"
        found[name] = exact
    return found


def part(protocol: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a protocol says of `samples`, `reference`, `extractor`: nothing, where another program wrote it."""
    found = protocol.get(name)
    return found if isinstance(found, dict) else {}


def sampler(samples: Mapping[str, Any]) -> str:
    """How they were drawn, in a few words."""
    steps, eta, guidance = (samples.get(name) for name in ("num_inference_steps", "eta", "guidance_scale"))
    words = [
        samples.get("scheduler"),
        steps and counted(steps, "step"),
        f"eta {eta:g}" if eta is not None else None,
        f"guidance {guidance:g}" if guidance is not None else None,
        f"seed {samples['seed']}" if "seed" in samples else None,
    ]
    return ", ".join(word for word in words if word)


def conditions(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What decides most whether the numbers of another model compare, in two lines of a front matter."""
    samples, name = part(protocol, "samples"), part(protocol, "extractor").get("name")
    if "count" not in samples:
        return {}
    drawn = sampler({key: value for key, value in samples.items() if key != "seed"}).replace("Scheduler", "")
    known = {"samples": f"{samples['count']}{' by ' * bool(drawn)}{drawn}", "features": name}
    return {key: value for key, value in known.items() if value}


def protocol_sentence(protocol: Mapping[str, Any], reference_name: str) -> str:
    """The same with the real images, as a sentence; "" where another program wrote the protocol."""
    samples, reference, extractor = (part(protocol, name) for name in ("samples", "reference", "extractor"))
    if "count" not in samples:
        return ""
    drawn = f" ({sampler(samples)}, {samples.get('dtype', 'float32')})" if samples.get("scheduler") else ""
    split = f", split {reference['split']}" if reference.get("split") else ""
    side = reference.get("resolution")
    size = f" at {side}x{side}" if isinstance(side, int) else ""
    count = counted(reference["count"], "image") if isinstance(reference.get("count"), int) else "the images"
    return (
        f"{counted(samples['count'], 'sample')}{drawn} against {count} of {reference_name}{split}{size}, on the "
        f"features of {extractor.get('name', 'an unknown extractor')}"
        + (f" ({extractor['dimensions']} dimensions)." if "dimensions" in extractor else ".")
    )


def cost_sentence(protocol: Mapping[str, Any]) -> str:
    """Where and how a cost was measured."""
    samples, threads = part(protocol, "samples"), protocol.get("threads_per_process")
    words = [
        samples.get("device") or protocol.get("device"),
        samples.get("dtype"),
        f"batches of {protocol.get('batch_size')}",
        f"{counted(protocol.get('processes') or 1, 'process')} of {counted(threads or 1, 'thread')}",
        sampler({key: value for key, value in samples.items() if key in ("scheduler", "num_inference_steps")}),
    ]
    return ", ".join(word for word in words if word)


def cost_rows(
    own: Mapping[str, float | str], other: Mapping[str, float | str] | None, without: Sequence[str] = ()
) -> list[list[str]]:
    """[what it is, own, the other's, own / other where it is a number] for each of `COSTS` that is known, but for
    those in `without`."""
    rows = []
    for key, (label, factor, unit) in COSTS.items():
        if key not in own or key in without:
            continue
        if isinstance(own[key], str):
            cells = [label, own[key], *([other.get(key, "-"), ""] if other else [])]
        elif other and other.get(key):
            values = (quantity(costs[key] * factor, unit) for costs in (own, other))
            cells = [label, *values, f"{own[key] / other[key]:.3g}"]
        else:
            cells = [label, quantity(own[key] * factor, unit), *(["-", "-"] if other else [])]
        rows.append(cells)
    return rows


def quantity(value: float, unit: str = "") -> str:
    """A count as it is, anything else to three digits or its whole part."""
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{text} {unit}".strip()


SIZES = ("parameters", "macs_per_forward")  # of `COSTS`, what `size_rows` says already


def size_rows(sizes: Mapping[str, Mapping[str, int | None]]) -> list[list[str]]:
    """[what it is, the teacher's, the student's, student / teacher]; without a teacher, the student's alone. `sizes`
    maps them to `parameters` and `macs`, those of one forward of one sample."""
    rows = []
    for key, label in (("parameters", "parameters of the denoiser"), ("macs", "multiply-adds a forward")):
        numbers = [sizes[who][key] for who in ("teacher", "student") if who in sizes]
        if None not in numbers:
            ratio = [f"{numbers[1] / numbers[0]:.3g}"] if len(numbers) == 2 else []
            rows.append([label, *(_count(number) for number in numbers), *ratio])
    return rows


def _count(number: int) -> str:
    """Exact below a million."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:#.4g} {unit}"
    return f"{number:,}"


def validation_sentence(args: Mapping[str, Any], sampler_name: str) -> str:
    """What the distances of a training run are; `args` are its flags."""
    split = args["validation_split"] or args.get("train_split") or "train"
    return (
        f"Frechet distance of {counted(args['validation_num_samples'], 'sample')} ({sampler_name}, "
        f"{counted(args['validation_num_inference_steps'], 'step')}, seed {args['seed']}) to split `{split}`, on the "
        f"features of `{args['validation_feature_extractor']}`. It is no FID, and compares with nothing measured "
        "otherwise."
    )
