# SPDX-License-Identifier: Apache-2.0
"""See what a student gets wrong: coarse or fine, where on the schedule, and where in the image.

    python analyze_error.py --pretrained_model_name_or_path assets/teacher --student_model_name_or_path student \\
        --dataset_name assets/fashion_mnist_16 --split test --feature_extractor assets/classifier \\
        --output_dir analysis

Teacher and student see the same noisy images and predict e_T and e_S. A least-squares line e_T ~ b0 + b1 * e_S splits
their difference (Han, Yeo, Yoo, CVPR 2026, the paper's probe): the coarse part is what the line removes, a wrong mean
or scale; the fine part is what it leaves. The student is then also sampled corrected, every prediction moved along a
line: a probe, no sampler, as it runs the teacher at every step. The gap that it closes between student and teacher is
what the coarse part cost. --probe says where the lines are fitted. Nothing is trained.
"""

import importlib.metadata
import platform
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from utils.analysis.arguments import HOW_TO_READ, for_backbone, parse_args
from utils.command_line import UsageError, announce, run, start

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args, __doc__)

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from utils.analysis.corrected import WHO, probe_denoisers
from utils.analysis.error import ErrorStatistics, summarize
from utils.analysis.report import FIGURES, MAPS_FILE, error_table, save_analysis, save_figures, weight_hashes
from utils.backbones import choose_backbone
from utils.counts import counted
from utils.data.rows import ImageRows, fingerprint, load_rows, sample_batch
from utils.devices import use_cpu_threads
from utils.distillation.features import Tapped
from utils.files import PACKAGES
from utils.metrics.distances import frechet_distance, rank_warning
from utils.metrics.extractors import load_extractor
from utils.metrics.statistics import FeatureStatistics
from utils.output_dir import lock_output_dir, unlock_output_dir
from utils.publishing.html_report import NAME as PAGE
from utils.publishing.html_report import report_measurement
from utils.randomness import ENCODE_STREAM, NOISE_STREAM, VALIDATION_STREAM, StepRandom, seed_from, shuffled

MAPS = 5  # places of the schedule with error maps


def refuse_mismatches(args, num_rows: int, image_channels: int, num_places: int) -> None:
    """Raises UsageError, naming the flag, where data or teacher cannot give what was asked for."""
    data = f"split '{args.split}'" if args.split else args.train_data_dir
    for flag in ("num_timesteps", "num_inference_steps"):
        if getattr(args, flag) > num_places:
            raise UsageError(
                f"--{flag} is {getattr(args, flag)}; the teacher's schedule has {num_places}. Take fewer."
            )
    if args.num_images > num_rows:
        raise UsageError(
            f"--num_images is {args.num_images}; {data} has {counted(num_rows, 'image')}. Take fewer, or another "
            "--split."
        )
    if args.feature_extractor and num_rows < 2:
        raise UsageError(
            f"--feature_extractor: a distance needs at least 2 images, and {data} has {num_rows}. Take "
            "another --split, or leave the distance out."
        )
    if args.feature_extractor and image_channels == 4:
        raise UsageError(
            "--feature_extractor: it sees grey or RGB images, and the teacher's have 4 channels (RGBA). Leave it out."
        )


def spread_places(count: int, num_places: int) -> list[int]:
    """Midpoints of `count` equal stretches of the schedule, so that their plain mean stands for all of it."""
    return [(2 * i + 1) * num_places // (2 * count) for i in range(count)]


def image_noise(shape: tuple[int, ...], seed: int, first: int, stream: int = NOISE_STREAM) -> torch.Tensor:
    """Standard normal noise of `shape` (B, ...): that of image `first` + i is a function of (seed, its index)."""
    noise = torch.empty(shape)
    for i, image in enumerate(noise, start=first):
        image.normal_(generator=torch.Generator().manual_seed(seed_from(seed, stream, i)))
    return noise


class EncodeRandom(StepRandom):
    """What a backbone draws to encode images, the same for an image in whatever batch it comes."""

    def __init__(self, seed: int, first: int, device: torch.device):
        super().__init__(seed, ENCODE_STREAM + first, device=device)
        self.seed, self.first = seed, first

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """As `image_noise`: the VAE's, drawn once."""
        return image_noise(shape, self.seed, self.first, ENCODE_STREAM).to(self.generator.device)


def image_batches(args, images: ImageRows) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(index of the first image, batch) until all have come, in order."""
    for first in range(0, len(images), args.batch_size):
        yield first, images.__getitems__([(0, i) for i in range(first, min(first + args.batch_size, len(images)))])


@torch.no_grad()
def measure_error(args, backbone, student: nn.Module, images: ImageRows, places: list[int]):
    """One `ErrorStatistics` a place of the schedule, and the first image noised for each, (C, *S).

    An image has the same noise at every place, so that curves compare like with like.
    """
    statistics, first_inputs = [ErrorStatistics(args.group_size) for _ in places], []
    device, student, teacher = student.device, Tapped(student), Tapped(backbone.teacher)
    progress = tqdm(total=len(images) * len(places), desc="error", unit="image")
    for first, batch in image_batches(args, images):
        batch = {name: value.to(device) for name, value in batch.items()}
        clean, condition = backbone.encode(batch, EncodeRandom(args.seed, first, device))
        noise = image_noise(clean.shape, args.seed, first).to(clean)
        for place, at_place in zip(places, statistics, strict=True):
            noised = backbone.process.noised(clean, noise, torch.full((len(clean),), place, device=device))
            student_pred = backbone.predict(student, noised, condition)
            teacher_pred = backbone.predict(teacher, noised, condition)
            at_place.update(student_pred.output, teacher_pred.output)
            if first == 0:
                first_inputs.append(noised.x_t[0].cpu())
            progress.update(len(clean))
    progress.close()
    return statistics, first_inputs


def measure_samples(
    args, backbone, student: nn.Module, images: ImageRows | None, extractor, real: ImageRows | None
) -> tuple[dict, dict]:
    """Samples of student, corrected student and teacher from the same noise, and of the same prompts where there are
    any: numbers, and the first few, uint8 (B, C, H, W). With an extractor also the Frechet distance of each to the
    `real` images, and as many prompts as there are samples or captions.

    UsageError: samples that are not finite.
    """
    denoisers = probe_denoisers(args.probe, student, backbone.teacher)
    count = args.num_samples if extractor else args.shown_samples
    prompted, num_prompts = (real, count) if extractor else (images, None)  # all captions, or those of the pictures
    features = {who: FeatureStatistics() for who in WHO}
    gaps, shown = dict.fromkeys(WHO, 0.0), {who: [] for who in WHO}
    progress = tqdm(total=len(denoisers) * count, desc="samples", unit="image")
    for first in range(0, count, args.batch_size):
        numbers = range(first, min(first + args.batch_size, count))
        seeds = [seed_from(args.seed, VALIDATION_STREAM, i) for i in numbers]  # those of the training scripts
        conditions = backbone.conditions.of_samples(prompted, first, len(seeds), num_prompts)
        samples = {}
        for who, denoiser in denoisers.items():
            try:
                samples[who] = backbone.sample(denoiser, seeds, args.num_inference_steps, conditions)
            except FloatingPointError as error:
                raise UsageError(f"Sampling ({who}) after {counted(first, 'sample')}: {error}") from error
            progress.update(len(seeds))
        for who, drawn in samples.items():
            gap = (drawn.double() - samples["teacher"].double()).abs()
            gaps[who] += gap.flatten(1).mean(1).sum().item() / count
            shown[who].append(drawn[: max(0, args.shown_samples - first)])
            if extractor:
                features[who].update(extractor(drawn.to(extractor.device)))
    progress.close()
    measured = {"num_samples": count, "probe": args.probe, "pixel_difference_to_teacher": gaps}
    conditions = backbone.conditions.of_samples(prompted, 0, count, num_prompts)
    if prompts := set(conditions) - {None}:
        measured["num_prompts"] = len(prompts)
        measured["shown"] = backbone.conditions.described(conditions[: args.shown_samples])
    if extractor:
        reference = FeatureStatistics()
        batches = tqdm(image_batches(args, real), desc="real images", total=-(-len(real) // args.batch_size))
        for _, batch in batches:
            reference.update(extractor(batch["pixels"].to(extractor.device)))
        measured["frechet_distance"] = {
            who: frechet_distance(reference.mean, reference.cov, own.mean, own.cov) for who, own in features.items()
        }
        measured["warning"] = rank_warning(min(count, reference.count), reference.mean.size)
        measured |= {"num_real_images": reference.count, "extractor": extractor.protocol}
    return measured, {who: torch.cat(images) for who, images in shown.items()}


def error_maps(statistics: list[ErrorStatistics], inputs: list[torch.Tensor], places: list[int]) -> dict:
    """What `error_maps.npz` holds: `place` (T,), a few of them; `image`, the first one noised, and `image_error`,
    its own, (T, C, H, W); `group_rank`, that of its channel 0, and `mean_error` of all images and channels, (T, H, W).
    """
    chosen = np.unique(np.linspace(0, len(places) - 1, MAPS).round().astype(int))
    return {
        "place": np.array(places)[chosen],
        "image": np.stack([inputs[i].numpy() for i in chosen]),
        "image_error": np.stack([statistics[i].first_error.numpy() for i in chosen]),
        "group_rank": np.stack([statistics[i].first_ranks.numpy() for i in chosen]),
        "mean_error": np.stack([statistics[i].error_map().numpy() for i in chosen]),
    }


def main(args: Namespace) -> None:
    """Load, measure, sample, write: in the order of the lines."""
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise UsageError(f"analyze_error.py is one process, found {accelerator.num_processes}: start it with python.")
    use_cpu_threads(args, accelerator)

    # Models and data; everything that can be refused has been by the end of this paragraph
    wanted = for_backbone(args)
    backbone = choose_backbone(wanted).load(wanted)
    backbone.conditions.share_dropped = 0.0  # the error of every image is that under its own prompt
    places = spread_places(args.num_timesteps, backbone.process.num_places)
    rows, transform = load_rows(args, args.split, split_flag="--split"), backbone.transform(wanted)
    refuse_mismatches(args, len(rows), len(transform.mode), backbone.process.num_places)
    extractor = None
    if args.feature_extractor:
        extractor = load_extractor(
            args.feature_extractor, device=accelerator.device, inception_path=args.inception_path
        )
    numbers = shuffled(args.seed, 0, len(rows))[: args.num_images]
    images = ImageRows(
        rows.select(numbers), transform, args.seed, skip_bad_images=args.skip_bad_images, numbers=numbers
    )
    real = ImageRows(rows, transform, args.seed, skip_bad_images=args.skip_bad_images) if extractor else None
    student, sizes = backbone.make_student(wanted, sample_batch(images, args.batch_size, args.seed))
    print(sizes, flush=True)
    student = student.to(accelerator.device).eval().requires_grad_(False)
    torch.nn.Module.to(backbone.teacher, accelerator.device, torch.float32)

    lock_output_dir(args.output_dir)
    statistics, first_inputs = measure_error(args, backbone, student, images, places)

    # The numbers first, those of the error before sampling begins, then the figures
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    analysis = {
        "protocol": {
            "arguments": vars(args),
            "versions": {"python": platform.python_version(), **versions},
            "device": accelerator.device.type,
            "data_fingerprint": fingerprint(rows),
            "num_rows": len(rows),
            "teacher_sha256": weight_hashes(args.pretrained_model_name_or_path, backbone.component),
            "student_sha256": weight_hashes(args.student_model_name_or_path, backbone.component),
            "resolution": backbone.resolution,
            "num_places": backbone.process.num_places,
            "place_name": backbone.process.place_name,
            "group_size": args.group_size,
            "sampler": {
                "name": backbone.process.name,
                "steps": args.num_inference_steps,
                **backbone.sampling_options,
            },
        },
        **summarize(statistics, places),
    }
    maps, folder = error_maps(statistics, first_inputs, places), Path(args.output_dir)
    analysis["error_maps"] = {"file": MAPS_FILE, "places": maps["place"].tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FIGURES, PAGE):  # of an analysis that this one replaces
        (folder / name).unlink(missing_ok=True)
    save_analysis(analysis, folder)
    np.savez(folder / MAPS_FILE, **maps)
    analysis["samples"], pictures = measure_samples(args, backbone, student, images, extractor, real)
    analysis["protocol"]["undecodable_rows"] = len((real or images).bad_rows)
    save_analysis(analysis, folder)
    announce("drawing the figures")
    save_figures(analysis, maps, pictures, folder)
    print(f"{error_table(analysis)}\n\n{HOW_TO_READ}\n")
    unlock_output_dir(args.output_dir)
    print(f"Saved in {folder}: analysis.json, {MAPS_FILE}, {', '.join(FIGURES)}")
    page = report_measurement(args.student_model_name_or_path, folder, "analysis", ("analysis.json", *FIGURES))
    print(f"Report: {page}")


if __name__ == "__main__":
    run(main, ARGS)
