# SPDX-License-Identifier: Apache-2.0
"""What samples are measured against: images or statistics."""

import hashlib
import json
import socket
import tempfile
import warnings
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from utils.command_line import UsageError
from utils.data.rows import fingerprint, load_rows
from utils.evaluation.image_sets import ImageSet, image_files
from utils.evaluation.measure import Measured, keeps_features, measure_images
from utils.files import versions, written_beside
from utils.metrics.extractors import extractor_identity
from utils.metrics.statistics import FeatureStatistics

FORMAT = 2  # of the cache: counted up when the same images and settings come to other numbers


def open_reference(args, extractor) -> ImageSet | FeatureStatistics:
    """The images, or the statistics, that the flags name; nothing is computed yet.

    Raises:
        UsageError: nothing there, or statistics of another extractor.
    """
    if args.reference_stats:
        try:
            statistics = FeatureStatistics.load(args.reference_stats)
        except ValueError as error:
            raise UsageError(f"--reference_stats: {error}") from error
        _check_extractor(statistics, extractor, args)
        measured_at = ((statistics.protocol or {}).get("reference") or {}).get("resolution")
        if args.resolution and measured_at not in (None, args.resolution):
            warnings.warn(
                f"--reference_stats {args.reference_stats} is of images of {measured_at} pixels, --resolution is "
                f"{args.resolution}.",
                stacklevel=2,
            )
        return statistics
    if args.cleanfid_stats:
        return _cleanfid_statistics(args)
    settings = {"crop": args.crop, "interpolation": args.image_interpolation_mode, "background": args.background}
    if args.reference_images:
        paths = image_files(args.reference_images, "--reference_images", args.max_reference_samples)
        return ImageSet.from_files(paths, "--reference_images", **settings)
    rows = load_rows(args, args.split, split_flag="--split")
    rows = rows.select(range(min(len(rows), args.max_reference_samples or len(rows))))
    if len(rows) < 2:
        raise UsageError(f"the reference has {len(rows)} image; a distance needs at least 2.")
    flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    return ImageSet(rows, flag, image_column=args.image_column, **settings)


def _check_extractor(statistics: FeatureStatistics, extractor, args) -> None:
    """Raises UsageError where the statistics are of other features than the extractor's."""
    flag, own = f"--reference_stats {args.reference_stats}", extractor.protocol
    if statistics.protocol is None:  # another tool's
        if statistics.mean.size != own["dimensions"]:
            raise UsageError(
                f"{flag} is of {statistics.mean.size} features, --feature_extractor {args.feature_extractor} gives "
                f"{own['dimensions']}: it was made with another extractor."
            )
        warnings.warn(
            f"{flag} does not say what it is of; taken to be features of {args.feature_extractor} as it is used here.",
            stacklevel=2,
        )
        return
    recorded = statistics.protocol.get("extractor")
    if not isinstance(recorded, dict):
        raise UsageError(f"{flag} does not say of which extractor it is: make it anew with --save_stats.")
    theirs, ours = extractor_identity(recorded), extractor_identity(own)
    if theirs != ours:
        changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        raise UsageError(
            f"{flag} is of the features of {recorded.get('name')}, not of those of --feature_extractor "
            f"{args.feature_extractor} (they differ in {', '.join(changed)}): such a distance means nothing. Use the "
            "same extractor and settings, or make the statistics anew with --save_stats."
        )


def _cleanfid_statistics(args) -> FeatureStatistics:
    """clean-fid's own, downloaded once into its package. Raises UsageError where they cannot be had."""
    from cleanfid.fid import get_reference_statistics

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; the downloader knows no timeout of its own
    try:
        mean, cov = get_reference_statistics(
            args.cleanfid_stats, args.cleanfid_res, mode=args.fid_mode, split=args.cleanfid_split
        )
    except (OSError, ValueError) as error:  # HTTP and URL errors are OSErrors; a cut file is a ValueError
        raise UsageError(
            f"--cleanfid_stats {args.cleanfid_stats} --cleanfid_res {args.cleanfid_res} --cleanfid_split "
            f"{args.cleanfid_split}: could not be had from clean-fid's server ({error}). clean-fid's README lists the "
            "names; without a network, give the .npz file itself as --reference_stats, or the images."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "statistics.npz", mu=mean, sigma=cov)
        return FeatureStatistics.load(Path(folder) / "statistics.npz")


def measure_reference(reference, extractor, accelerator: Accelerator, args) -> tuple[Measured, dict]:
    """The reference's statistics, and features if they are kept, and its protocol; from the cache where it was
    measured before. The key is the images' bytes and all that decides their features."""
    if isinstance(reference, FeatureStatistics):
        kind = {"statistics": args.reference_stats or f"clean-fid's {args.cleanfid_stats}"}
        if args.cleanfid_stats:
            kind |= {"resolution": args.cleanfid_res, "split": args.cleanfid_split}
        return Measured(reference), {**kind, "count": reference.count, "made_with": reference.protocol}
    quiet, transform = not accelerator.is_local_main_process, reference.transform
    content = reference.content_hash(quiet=quiet) if accelerator.is_main_process else None
    filtered = "bilinear with antialiasing" if transform.interpolation == "bilinear" else transform.interpolation
    resize = f"shorter side, Pillow {filtered}, then centre crop" if reference.cut else "none"
    names = ("reference_images",)
    if not args.reference_images:
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "split", "image_column")
    protocol = {
        **{name: getattr(args, name) for name in names if getattr(args, name)},
        "count": len(reference),
        **({"crop": transform.crop} if transform.crop else {}),
        "resolution": transform.resolution if reference.cut else None,
        "resize": resize,
        "sha256": content,
    }
    if not args.reference_images:
        protocol["fingerprint"] = fingerprint(reference.rows)
    cached = _Cache(args.reference_cache_dir, cache_key(args, reference, content, extractor, accelerator.device.type))
    measured = cached.load(keeps_features(args)) if accelerator.is_main_process else None
    found = [measured is not None]
    broadcast_object_list(found)
    if not found[0]:
        measured = measure_images(reference, extractor, accelerator, args, "reference", is_reference=True)
        if accelerator.is_main_process:
            cached.save(measured)
    if accelerator.is_main_process:
        measured.statistics.protocol = {"extractor": extractor.protocol, "reference": protocol}
    return measured, protocol


def cache_key(args, reference: ImageSet, content: str | None, extractor, device: str) -> dict:
    """All that the measured numbers depend on: `content`, the hash of the images' bytes; how they are read, by every
    field of the transform; what measures them."""
    read = {name: value for name, value in reference.transform.settings().items() if name != "image_column"}
    return {
        "format": FORMAT,
        "content": content,
        "read": {**read, "cut": reference.cut},
        "extractor": extractor.protocol,
        "batch_size": args.batch_size,  # decides the last bits
        "device": device,
        "versions": versions("torch", "pillow", "numpy"),
    }


class _Cache:
    """Statistics and features of reference images, in one file each, written beside and renamed."""

    def __init__(self, folder: str, key: dict):
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self.statistics = Path(folder).expanduser() / f"{name}.npz"
        self.features = self.statistics.with_suffix(".features.npy")

    def load(self, keep_features: bool) -> Measured | None:
        """What was saved under the key; None where that is not enough, or damaged."""
        if not self.statistics.exists() or (keep_features and not self.features.exists()):
            return None
        try:
            features = np.load(self.features, allow_pickle=False) if keep_features else None
            measured = Measured(FeatureStatistics.load(self.statistics), features)
            if keep_features and len(features) != measured.statistics.count:
                raise ValueError(f"{len(features)} features of {measured.statistics.count} images")
        except (ValueError, OSError, EOFError) as error:
            warnings.warn(f"the reference is measured again: its cache is damaged ({error}).", stacklevel=2)
            return None
        print(f"reference: from the cache, {self.statistics}")
        return measured

    def save(self, measured: Measured) -> None:
        """Leave it for the next run."""
        try:
            self.statistics.parent.mkdir(parents=True, exist_ok=True)
            if measured.features is not None:
                with written_beside(self.features) as beside:
                    np.save(beside, measured.features)
            with written_beside(self.statistics) as beside:
                measured.statistics.save(beside)
        except OSError as error:
            warnings.warn(
                f"--reference_cache_dir cannot be written, so nothing is kept for the next run: {error}", stacklevel=2
            )
