# SPDX-License-Identifier: Apache-2.0
"""Features to statistics, statistics to the Frechet distance.

    extractor = FeatureExtractor("assets/classifier")
    real, generated = FeatureStatistics(), FeatureStatistics()
    for images in real_batches:                     # (B, 1 or 3, H, W) uint8
        real.update(extractor(images))
    ...
    frechet_distance(real.mean, real.cov, generated.mean, generated.cov)

With Inception features this number is FID. With any other extractor it is a Frechet distance of that extractor, and
can be compared only with numbers of the same extractor, reference and counts: fewer samples give a larger value.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, as FID defines it: Heusel et al. 2017, eq. 6.

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^1/2), in float64, in squared units of the features.
    The last trace is the sum of square roots of the eigenvalues of cov1^1/2 cov2 cov1^1/2: that matrix is symmetric,
    where cov1 cov2 is not, so a singular covariance needs no offset on its diagonal and no complex root appears.

    Means are (D,), covariances (D, D) symmetric. Raises ValueError when the shapes do not fit each other.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(array, dtype=np.float64) for array in (mean1, cov1, mean2, cov2))
    dim = mean1.size
    if mean1.shape != (dim,) or mean2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        raise ValueError(
            f"Cannot compare statistics of shapes {mean1.shape}, {cov1.shape} and {mean2.shape}, {cov2.shape}: "
            "both must come from the same feature extractor."
        )
    eigenvalues, eigenvectors = np.linalg.eigh(cov1)
    # Zero eigenvalues come out as +-1e-16 of the largest one; a negative one would turn the root into NaN.
    root1 = (eigenvectors * np.sqrt(eigenvalues.clip(min=0))) @ eigenvectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root1 @ cov2 @ root1).clip(min=0)).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(float(distance), 0.0)  # equal statistics may end at -1e-12


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that arrive in batches; memory O(D^2) however many arrive.

    Batches are merged by their own means and scatters (Chan, Golub, LeVeque 1979) in float64: sums of x and x^2 would
    lose the covariance to cancellation when the mean is large beside the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None  # (D,)
        self._scatter: np.ndarray | None = None  # (D, D), sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor | np.ndarray) -> None:
        """Add a batch (B, D), from any device, in any float type. B may differ from call to call, and may be 0.

        Raises ValueError when the shape does not fit the earlier batches, or a feature is NaN or infinite.
        """
        if isinstance(features, Tensor):
            features = features.detach().to("cpu", torch.float64).numpy()
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or (self.count > 0 and features.shape[1] != self._mean.size):
            wanted = "(B, D)" if self.count == 0 else f"(B, {self._mean.size})"
            raise ValueError(f"Features must be {wanted}, found {features.shape}.")
        if not np.isfinite(features).all():
            raise ValueError("Features contain NaN or infinity; if the extractor runs in half precision, use float32.")
        added = len(features)
        if added == 0:
            return

        batch_mean = features.mean(axis=0)
        centred = features - batch_mean
        batch_scatter = centred.T @ centred
        if self.count == 0:
            self.count, self._mean, self._scatter = added, batch_mean, batch_scatter
            return
        total = self.count + added
        shift = batch_mean - self._mean
        self._scatter = self._scatter + batch_scatter + np.outer(shift, shift) * (self.count * added / total)
        self._mean = self._mean + shift * (added / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """(D,) float64. Raises ValueError before the first sample."""
        if self.count == 0:
            raise ValueError("No features were added: there is no mean.")
        return self._mean

    @property
    def cov(self) -> np.ndarray:
        """(D, D) float64, divided by count - 1 as np.cov does. Raises ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 samples, found {self.count}.")
        return self._scatter / (self.count - 1)

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file of three arrays: count, mean, scatter. `load` gives back the same bits."""
        with open(path, "wb") as file:  # np.savez would append .npz to a path of its own
            np.savez(file, count=self.count, mean=self.mean, scatter=self._scatter)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureStatistics":
        """Read what `save` wrote; more batches may be added. Raises ValueError when the file is absent or another."""
        if not Path(path).is_file():
            raise ValueError(f"Feature statistics {path} do not exist.")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                count, mean, scatter = (arrays[name] for name in ("count", "mean", "scatter"))
        except Exception as error:  # zip, zlib, header and key errors of a foreign or cut file have no common class
            raise ValueError(f"{path} does not hold feature statistics: {error}") from error
        if mean.ndim != 1 or scatter.shape != mean.shape * 2:
            raise ValueError(f"{path} does not hold feature statistics: mean {mean.shape}, scatter {scatter.shape}.")
        statistics = cls()
        statistics.count, statistics._mean, statistics._scatter = int(count), mean, scatter
        return statistics
