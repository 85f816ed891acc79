# SPDX-License-Identifier: Apache-2.0
"""Measure any diffusers pipeline, or a folder of images, against any set of images.

    python evaluate_fid.py --pretrained_model_name_or_path student --num_samples 5000 --num_inference_steps 25 \\
        --scheduler DDIMScheduler --dataset_name assets/fashion_mnist_16 --split test \\
        --feature_extractor assets/classifier --compare_to assets/teacher
    python evaluate_fid.py --images samples/ --reference_images photos/              # two folders, FID by clean-fid
    accelerate launch --multi_gpu evaluate_fid.py --pretrained_model_name_or_path faces-50 --dataset_name your/faces \\
        --num_samples 50000 --compare_to google/ddpm-celebahq-256                    # several processes, same numbers

FID, KID, precision and recall, Inception Score and CLIP score; parameters, multiply-adds, time and memory beside them.
The protocol is written with the numbers, into metrics.json: without it they compare with nothing. A sample is a
function of (seed, index), whatever the number of processes; a run that was stopped goes on with the same command.
"""

import shutil
import warnings
from argparse import Namespace
from pathlib import Path

from utils.command_line import UsageError, announce, run, start
from utils.counts import counted
from utils.evaluation.arguments import METRICS, PR_NEIGHBOURS, parse_args

if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args, __doc__)

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from utils.data.labels import class_names
from utils.devices import DTYPES
from utils.distributed import main_process_first, on_main_process, process_settings, wait_for_everyone
from utils.evaluation.conditions import read_class_labels, read_prompts
from utils.evaluation.cost import Meter, cost, free
from utils.evaluation.image_sets import ImageSet, image_files
from utils.evaluation.measure import Measured, measure_images
from utils.evaluation.parallel import block_threads, check_processes
from utils.evaluation.pipelines import load_pipeline, pipeline_files, pipeline_folder, use_clip_sample, use_scheduler
from utils.evaluation.reference import measure_reference, open_reference
from utils.evaluation.report import next_command, open_card, report, update_model_card
from utils.evaluation.sample_folder import OTHER, SampleFolder, clear_evaluation
from utils.evaluation.sampler import Sampler
from utils.files import read_json, sha256, versions, write_json
from utils.grids import image_grid, writable
from utils.metrics.clip import ClipScorer
from utils.metrics.distances import (
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    rank_warning,
    subset_warning,
)
from utils.metrics.extractors import load_extractor
from utils.output_dir import check_output_dir, lock_output_dir, unlock_output_dir
from utils.publishing.html_report import report_measurement
from utils.publishing.readable import COSTS
from utils.publishing.readable import sampler as sampler_sentence

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "numpy", "pillow")
GRID_IMAGES = 32
FILES = ("metrics.json", "samples.png")
PIPELINE = "--pretrained_model_name_or_path"


def open_measures(args, device):
    """What measures, and what is measured against: extractor, CLIP, reference, prompts. Raises UsageError."""
    extractor = load_extractor(
        args.feature_extractor,
        device=device,
        fid_mode=args.fid_mode,
        inception_path=args.inception_path,
        with_probabilities="is" in args.metrics,
    )
    clip = ClipScorer(args.clip_model, device=device) if "clip" in args.metrics else None
    reference = open_reference(args, extractor)
    return extractor, clip, reference, read_prompts(args, reference)


def open_sampler(args, flag: str, reference, prompts: list[str] | None, device) -> tuple[Sampler, dict[str, Path]]:
    """The pipeline that `flag` names, set up as the flags say, and its files by path. Raises UsageError."""
    name, first = getattr(args, flag.removeprefix("--")), flag == PIPELINE
    revision, variant = (args.revision, args.variant) if first else (None, None)
    folder = pipeline_folder(name, flag, revision=revision, variant=variant, pickled=args.allow_pickle_weights)
    pipeline = load_pipeline(
        folder, flag, dtype=DTYPES[args.dtype], device=device, variant=variant, pickled=args.allow_pickle_weights
    )
    if args.scheduler:
        use_scheduler(pipeline, args.scheduler)
    if args.clip_sample:
        use_clip_sample(pipeline, args.clip_sample == "true")
    names = "seed num_inference_steps eta guidance_scale guidance_channels height width max_sequence_length".split()
    try:
        labels = read_class_labels(args, reference, pipeline, class_names(read_json(folder / "model_index.json")))
        options = {name: getattr(args, name) for name in names}
        sampler = Sampler(pipeline, class_labels=labels, prompts=prompts, **options)
    except UsageError as error:
        raise error if first else UsageError(f"{flag} {name}: {error}") from error
    return sampler, {str(path.relative_to(folder)): path for path in pipeline_files(folder, pipeline, variant)}


def fit_reference(args, reference: ImageSet, size: tuple[int, int] | None, quiet: bool) -> None:
    """Images of a dataset are brought to the (height, width) of the samples, files of a folder read as they are, and
    both brought to `--resolution` where it is given. Raises UsageError."""
    if args.resolution:
        reference.resize_to(args.resolution)
    elif args.reference_images:
        own = reference.keep_size(quiet=quiet)
        if size and own != size:
            warnings.warn(
                f"the samples are {size[0]}x{size[1]}, --reference_images {own[0]}x{own[1]}: the extractor resizes "
                "each from its own size. --resolution brings both to one.",
                stacklevel=2,
            )
    elif size is None or size[0] != size[1]:
        what = f"the samples are {size[0]}x{size[1]}" if size else "the size of the samples cannot be told beforehand"
        raise UsageError(f"--resolution: {what}. Say to how many pixels a side samples and reference are brought.")
    else:
        reference.resize_to(size[0])


def draw_missing(samples: SampleFolder, meter: Meter, accelerator: Accelerator, what: str = "sampling") -> None:
    """Draw the blocks that are not on disk yet; the missing ones are dealt to the processes in turn."""
    missing = [samples.missing() if accelerator.is_main_process else None]
    broadcast_object_list(missing)
    own = missing[0][accelerator.process_index :: accelerator.num_processes]
    done = samples.num_samples - sum(len(block) for block in missing[0])
    progress = tqdm(
        total=samples.num_samples,
        initial=done,
        desc=what,
        unit="image",
        disable=not accelerator.is_local_main_process,
    )
    for number, _ in enumerate(meter.draw(own, keep=samples.write)):
        together = missing[0][number * accelerator.num_processes : (number + 1) * accelerator.num_processes]
        progress.update(sum(len(other) for other in together))
    progress.close()
    wait_for_everyone(accelerator)


def compute_metrics(args, real: Measured, generated: Measured, device) -> dict[str, float]:
    """The numbers that `--metrics` asks for."""
    metrics = {}
    if "fid" in args.metrics:
        metrics["frechet_distance"] = frechet_distance(
            real.statistics.mean, real.statistics.cov, generated.statistics.mean, generated.statistics.cov
        )
    if {"kid", "pr"} & set(args.metrics):
        features = [torch.from_numpy(each.features).to(device) for each in (real, generated)]
        if "kid" in args.metrics:
            metrics["kernel_distance"], metrics["kernel_distance_stderr"] = kernel_distance(
                *features, subsets=args.kid_subsets, subset_size=args.kid_subset_size, seed=args.seed
            )
        if "pr" in args.metrics:
            metrics["precision"], metrics["recall"] = precision_recall(*features, k=PR_NEIGHBOURS)
    if "is" in args.metrics:
        metrics["inception_score"], metrics["inception_score_std"] = inception_score(
            generated.probabilities, seed=args.seed
        )
    if "clip" in args.metrics:
        metrics["clip_score"] = clip_score(generated.similarities)
    return metrics


def size_of_other(args, told) -> tuple[int, int] | None:
    """Of the samples of `--compare_to`, as far as that can be told. Raises UsageError, as `open_sampler`."""
    sampler, _ = open_sampler(args, "--compare_to", *told, "cpu")
    return sampler.size()


def refuse_other_size(args, size: tuple[int, int] | None, other: tuple[int, int] | None) -> None:
    """Raises UsageError where `--compare_to` draws another size, and both are to be measured as they are drawn."""
    if size and other and size != other and not args.resolution and args.compare_num_samples == args.num_samples:
        raise UsageError(
            f"--compare_to {args.compare_to} draws {other[0]}x{other[1]}, the samples are {size[0]}x{size[1]}: bring "
            "both to one with --resolution, or measure only what it costs, with --compare_num_samples 64."
        )


def check_counts(args, count: int, reference) -> None:
    """Raises UsageError where there are too few samples or reference images for one of `--metrics`."""
    for name in args.metrics:
        compared = [count, len(reference)] if name in ("kid", "pr") else [count]
        if min(compared) < METRICS[name]:
            raise UsageError(
                f"--metrics {name} needs at least {METRICS[name]} samples, and as many reference images where it "
                f"compares them; there are {' and '.join(map(str, compared))}. Give more, or leave it out."
            )


def draw_other(args, told, accelerator) -> tuple[SampleFolder, dict]:
    """Samples of `--compare_to` from the same noise, as many as are asked for, on disk as those of the first are; and
    what it costs. `told`: reference and prompts."""
    other, files = open_sampler(args, "--compare_to", *told, accelerator.device)
    samples = SampleFolder(str(Path(args.output_dir) / OTHER), args.compare_num_samples, args.batch_size)
    on_main_process(accelerator, samples.open, drawn_how(args, other, files))
    draw_missing(samples, Meter(other, accelerator.device, args.num_cpu_threads), accelerator, "sampling --compare_to")
    records = samples.block_records()
    return samples, cost(other.pipeline, records, list(files.values()), accelerator.num_processes)


def drawn_how(args, sampler: Sampler, files: dict[str, Path]) -> dict:
    """All that samples depend on."""
    return sampler.protocol | {
        "batch_size": args.batch_size,  # decides the last bits
        "model_files": {name: sha256(path) for name, path in files.items()},
        "versions": versions("torch", "diffusers"),
    }


def images_of(samples: SampleFolder, resolution: int | None, size: tuple[int, int] | None, quiet: bool, **options):
    """The samples as they are measured. Raises UsageError where they are not of the (height, width) that the reference
    was brought to; None, where that cannot be told beforehand."""
    images = ImageSet.from_files(samples.paths(), "samples", **options)
    if not resolution and size not in (None, drawn := images.keep_size(quiet=quiet)):
        raise UsageError(
            f"--resolution: the samples are {drawn[0]}x{drawn[1]}, not {size[0]}x{size[1]} as the reference was "
            "brought to. Say to what both are brought; the samples are kept."
        )
    if resolution:
        images.resize_to(resolution)
    return images


def samples_grid(args, images: ImageSet, others: SampleFolder | None, words: list[str], content: dict):
    """The first of `images`; above them those of `--compare_to`, `others`, from the same noise, where there are any.
    `words` say what samples are of, over and over; `content`, that of metrics.json, how they were drawn and measured.
    """
    numbers = range(min(GRID_IMAGES, len(images), others.num_samples if others else GRID_IMAGES))
    metrics, protocol = content["metrics"], content["protocol"]
    names = args.images or args.pretrained_model_name_or_path, args.compare_to or ""
    own, other = (Path(name).resolve().name for name in names)
    rows = {own: images.__getitems__(list(numbers))}
    if others:
        other = "--compare_to" if other == own else other
        rows = {other: images_of(others, None, None, quiet=True).__getitems__(list(numbers)), **rows}
    columns = writable([words[number % len(words)] for number in numbers]) if words else ()
    lines = [sampler_sentence(protocol["samples"])]
    if "frechet_distance" in metrics:
        extractor = Path(protocol["extractor"]["name"]).name
        distance = f"Frechet distance of {own} {metrics['frechet_distance']:.4g}"
        if "frechet_distance" in (compared := content.get("compare_to_metrics", {})):
            distance += f", of {other} {compared['frechet_distance']:.4g}"
        size = f" at {args.resolution} pixels" if args.resolution else ""  # shown are those that were drawn
        lines.append(f"{distance}: {counted(protocol['samples']['count'], 'sample')}{size}, features of {extractor}")
    return image_grid(rows, columns=columns, title="\n".join(filter(None, lines)))


def main(args: Namespace) -> None:
    """Check, measure the reference, sample, measure the samples, report: in the order of the lines."""
    accelerator = Accelerator(kwargs_handlers=process_settings())
    check_processes(accelerator)
    args.num_cpu_threads = block_threads(args.num_cpu_threads, accelerator)
    quiet = not accelerator.is_local_main_process
    on_main_process(accelerator, check_output_dir, args.output_dir)
    if args.update_model_card:
        open_card(Path(args.pretrained_model_name_or_path))  # what it would refuse, now and not at the end

    # What measures, and what is measured against
    extractor, clip, reference, prompts = main_process_first(accelerator, open_measures, args, accelerator.device)

    # What is measured
    resizing = {"interpolation": args.image_interpolation_mode}
    if args.images:
        files = image_files(args.images, "--images", args.num_samples)
        images = ImageSet.from_files(files, "--images", background=args.background, **resizing)
        if args.skip_bad_images:
            images.leave_out_unreadable(quiet=quiet)
        if args.num_samples and len(images) < args.num_samples:
            found = counted(len(images), "image")
            warnings.warn(f"--images {args.images} has {found}, not {args.num_samples}.", stacklevel=1)
        size = (args.resolution,) * 2 if args.resolution else images.keep_size(quiet=quiet)
        count, sampler = len(images), None
    else:
        told = reference, prompts  # what samples are told may be of the reference's rows
        other_size = None
        if args.compare_to:  # what it would refuse, now and not hours later
            other_size = on_main_process(accelerator, size_of_other, args, told)
        sampler, files = main_process_first(accelerator, open_sampler, args, PIPELINE, *told, accelerator.device)
        size, count = sampler.size(), args.num_samples
        on_main_process(accelerator, refuse_other_size, args, size, other_size)
        if not args.label_column and count < (classes := len(sampler.class_labels or [])):
            drawn = f"of {counted(classes, 'class')} the first {count} only"
            warnings.warn(f"--num_samples {count}: {drawn}.", stacklevel=1)
    if isinstance(reference, ImageSet):
        if args.skip_bad_images:
            reference.leave_out_unreadable(quiet=quiet)
        fit_reference(args, reference, size, quiet)
    check_counts(args, count, reference)

    # Where the samples go, and where an earlier run left off
    on_main_process(accelerator, lock_output_dir, args.output_dir)
    if args.overwrite_output_dir:
        on_main_process(accelerator, clear_evaluation, args.output_dir)
    if sampler:
        samples = SampleFolder(args.output_dir, count, args.batch_size)
        how = drawn_how(args, sampler, files)
        if done := on_main_process(accelerator, samples.open, how):
            print(f"{done:,} of {counted(count, 'sample')} in {samples.images} already")

    # Reference, then samples
    real, reference_protocol = measure_reference(reference, extractor, accelerator, args)
    if accelerator.is_main_process and args.save_stats:
        real.statistics.save(args.save_stats)
    if sampler:
        draw_missing(samples, Meter(sampler, accelerator.device, args.num_cpu_threads), accelerator)
        images = images_of(samples, args.resolution, size, quiet, **resizing)
    elif args.resolution:
        images.resize_to(args.resolution)
    generated = measure_images(images, extractor, accelerator, args, "features", clip=clip, prompts=prompts)

    # What it costs; with --compare_to, the other too, and how far that is from the same reference
    costs, others, compared, words = {}, None, None, sampler.described() if sampler else []
    if sampler:
        records = samples.block_records()
        costs["cost"] = cost(sampler.pipeline, records, list(files.values()), accelerator.num_processes)
    if args.compare_to:
        free(sampler)
        others, costs["compare_to"] = draw_other(args, told, accelerator)
        numbers = [key for key in COSTS if not isinstance(costs["cost"].get(key, ""), str)]
        costs["ratios"] = {key: costs["cost"][key] / costs["compare_to"][key] for key in numbers}
        if others.num_samples == count:
            of_other = images_of(others, args.resolution, size, quiet, **resizing)
            told_clip = {"clip": clip, "prompts": prompts}
            compared = measure_images(of_other, extractor, accelerator, args, "features of --compare_to", **told_clip)

    # Metrics and the report
    if accelerator.is_main_process:
        announce(f"computing {', '.join(args.metrics)}")
        counts, warned = [each.statistics.count for each in (generated, real)], []
        if "fid" in args.metrics:
            warned += [rank_warning(each, extractor.protocol["dimensions"]) for each in counts]
        if "kid" in args.metrics:
            warned.append(subset_warning(args.kid_subset_size, *counts))
        if sampler:
            source = how | {"name": args.pretrained_model_name_or_path}
        else:
            source = {"images": args.images, "sha256": images.content_hash(quiet=quiet)}
        content = {
            "metrics": compute_metrics(args, real, generated, accelerator.device),
            **({"compare_to_metrics": compute_metrics(args, real, compared, accelerator.device)} if compared else {}),
            **costs,
            "warnings": [text for text in dict.fromkeys(warned) if text],
            "protocol": {
                "samples": {
                    **source,
                    "count": count,
                    "resolution": args.resolution,
                    **(resizing if args.resolution else {}),
                },
                "reference": reference_protocol,
                "extractor": extractor.protocol,
                "clip_model": clip and clip.protocol,
                "seed": args.seed,
                "kid_subsets": args.kid_subsets,
                "kid_subset_size": min(args.kid_subset_size, *filter(None, counts)),
                "precision_recall_k": PR_NEIGHBOURS,
                "batch_size": args.batch_size,
                "processes": accelerator.num_processes,
                "threads_per_process": args.num_cpu_threads,
                "device": accelerator.device.type,
                "versions": versions(*PACKAGES, "clean-fid"),
                "arguments": vars(args),
            },
        }
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", content)
        if sampler and args.resolution:  # shown as they were drawn, as those of --compare_to are
            images = ImageSet.from_files(samples.paths(), "samples")
            images.keep_size(quiet=True)
        samples_grid(args, images, others, words, content).save(folder / "samples.png")
        if sampler and not args.keep_images:
            for path in (samples.images, samples.records, *([Path(args.output_dir) / OTHER] if others else [])):
                shutil.rmtree(path)
        print(f"\n{report(content)}")
        print(f"Saved: {folder / 'metrics.json'}, with the protocol; samples: {folder / 'samples.png'}")
        page = report_measurement(
            None if args.images else args.pretrained_model_name_or_path, folder, "evaluation", FILES
        )
        print(f"Report: {page}")
        if args.update_model_card:
            print(f"Updated: {update_model_card(Path(args.pretrained_model_name_or_path), content)}")
        columns = getattr(getattr(reference, "rows", None), "column_names", ())
        print(next_command(args, columns, real.statistics.count, labelled=bool(sampler and sampler.class_labels)))
    wait_for_everyone(accelerator)
    accelerator.end_training()
    unlock_output_dir(args.output_dir)


if __name__ == "__main__":
    run(main, ARGS)
