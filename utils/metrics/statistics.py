# SPDX-License-Identifier: Apache-2.0
"""Count, mean and covariance of features that arrive in batches: all that a Frechet distance needs of them."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that arrive in batches; memory O(D^2) however many arrive.

    Batches are merged by their own means and scatters (Chan, Golub, LeVeque 1979) in float64: sums of x and x^2 would
    lose the covariance to cancellation when the mean is large beside the spread.

    Attributes:
        count: samples so far; None for a file of another tool, which says no count.
        protocol: what the features are (extractor, resize, dataset ...), of JSON's types; kept by `save` and `load`.
    """

    def __init__(self, protocol: dict | None = None) -> None:
        self.count: int | None = 0
        self.protocol = protocol
        self._mean: np.ndarray | None = None  # (D,)
        self._scatter: np.ndarray | None = None  # (D, D), sum of (x - mean)(x - mean)^T
        self._loaded_cov: np.ndarray | None = None  # (D, D)

    def update(self, features: Tensor | np.ndarray) -> None:
        """Add a batch (B, D), from any device, in any float type. B may differ from call to call, and may be 0.

        Raises ValueError when the shape does not fit the earlier batches, or a feature is NaN or infinite.
        """
        assert self._loaded_cov is None, "statistics from a file take no more samples"
        if isinstance(features, Tensor):
            features = features.detach().to("cpu", torch.float64).numpy()
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != self._mean.size):
            wanted = "(B, D)" if self._mean is None else f"(B, {self._mean.size})"
            raise ValueError(f"Features must be {wanted}, found {features.shape}.")
        if not np.isfinite(features).all():
            raise ValueError("Features contain NaN or infinity; if the extractor runs in half precision, use float32.")
        if len(features) == 0:
            return
        mean = features.mean(axis=0)
        centred = features - mean
        scatter = centred.T @ centred
        total = self.count + len(features)
        if self.count > 0:
            shift = mean - self._mean
            scatter += self._scatter + np.outer(shift, shift) * (self.count * len(features) / total)
            mean = self._mean + shift * (len(features) / total)
        self.count, self._mean, self._scatter = total, mean, scatter

    @property
    def mean(self) -> np.ndarray:
        """(D,) float64. Raises ValueError before the first sample."""
        if self._mean is None:
            raise ValueError("No features were added: there is no mean.")
        return self._mean

    @property
    def cov(self) -> np.ndarray:
        """(D, D) float64, divided by count - 1 as np.cov does. Raises ValueError with fewer than two samples."""
        if self._loaded_cov is not None:
            return self._loaded_cov
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 samples, found {self.count}.")
        return self._scatter / (self.count - 1)

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file: `mu` and `sigma`, which clean-fid and pytorch-fid read too, count and protocol.

        Raises ValueError with fewer than two samples. `load` gives back the same bits.
        """
        arrays = {"mu": self.mean, "sigma": self.cov, "protocol": json.dumps(self.protocol, sort_keys=True)}
        if self.count is not None:
            arrays["count"] = self.count
        with open(path, "wb") as file:  # np.savez would append .npz to a path of its own
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureStatistics":
        """Read what `save`, clean-fid or pytorch-fid wrote; the last two say no count and no protocol.

        Raises ValueError when the file is absent, or holds something else, or NaN.
        """
        if not Path(path).is_file():
            raise ValueError(f"Feature statistics {path} do not exist.")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, cov = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
                count = int(arrays["count"]) if "count" in arrays else None
                protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else None
        except Exception as error:  # zip, zlib, header and key errors of a foreign or cut file have no common class
            raise ValueError(f"{path} does not hold feature statistics: {error}") from error
        if not isinstance(protocol, dict | None):
            raise ValueError(f"{path} does not hold feature statistics: its protocol is {protocol!r}.")
        if mean.ndim != 1 or cov.shape != mean.shape * 2:
            raise ValueError(f"{path} does not hold feature statistics: mu {mean.shape}, sigma {cov.shape}.")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError(f"{path} does not hold feature statistics: it contains NaN or infinity.")
        statistics = cls(protocol)
        statistics.count, statistics._mean, statistics._loaded_cov = count, mean, cov
        return statistics
