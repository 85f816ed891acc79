# SPDX-License-Identifier: Apache-2.0
"""Images to everything the metrics need of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from utils.evaluation.image_sets import ImageSet
from utils.evaluation.parallel import in_order
from utils.metrics.statistics import FeatureStatistics


def keeps_features(args) -> bool:
    """Whether one of `--metrics` needs all features, and not their mean and covariance alone."""
    return bool({"kid", "pr"} & set(args.metrics))


@dataclass
class Measured:
    """Of one set of images, on the main process; N images, D features."""

    statistics: FeatureStatistics
    features: np.ndarray | None = None  # (N, D) float32, where kernel distance or precision and recall need them
    probabilities: np.ndarray | None = None  # (N, classes) float32, for the Inception Score
    similarities: np.ndarray | None = None  # (N,), cosine of image and prompt, for the CLIP score


def measure_images(
    images: ImageSet,
    extractor,
    accelerator: Accelerator,
    args,
    description: str,
    *,
    is_reference: bool = False,
    clip=None,
    prompts: Sequence[str] | None = None,
) -> Measured:
    """Run all extractors over all images, on all processes; of a reference, nobody asks classes and prompts. Where
    `--metrics` names the Frechet distance alone the memory does not grow with the number of images."""
    keep_features = keeps_features(args)
    probabilities = "is" in args.metrics and not is_reference

    def work(batch: torch.Tensor, indices: range) -> list[np.ndarray | None]:
        batch = batch.to(accelerator.device)
        features, classes, cosines = None, None, None
        if probabilities:
            features, classes = extractor.features_and_probabilities(batch)
        else:
            features = extractor(batch)
        if clip is not None:
            cosines = clip(batch, [prompts[images.numbers[index] % len(prompts)] for index in indices])
        return [None if found is None else found.cpu().numpy() for found in (features, classes, cosines)]

    statistics, kept = FeatureStatistics(), ([], [], [])
    results = in_order(
        images,
        work,
        accelerator,
        batch_size=args.batch_size,
        threads=args.num_cpu_threads,
        num_workers=args.dataloader_num_workers,
        description=description,
    )
    for found in results:
        if accelerator.is_main_process:
            statistics.update(found[0])
            for store, array, wanted in zip(kept, found, (keep_features, probabilities, clip), strict=True):
                if wanted:
                    store.append(array)
    return Measured(statistics, *(np.concatenate(store) if store else None for store in kept))
