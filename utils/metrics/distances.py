# SPDX-License-Identifier: Apache-2.0
"""Features to numbers: Frechet and kernel distance, precision and recall, Inception Score, CLIP score.

    extractor = load_extractor("assets/classifier")
    real, generated = FeatureStatistics(), FeatureStatistics()  # utils/metrics/statistics.py
    for images in real_batches:                     # (B, 1 or 3, H, W) uint8
        real.update(extractor(images))
    ...
    frechet_distance(real.mean, real.cov, generated.mean, generated.cov)

With Inception features these numbers are FID, KID and so on. With any other extractor they are distances of that
extractor, and can be compared only with numbers of the same extractor, reference and counts: fewer samples give a
larger Frechet distance. The Frechet distance needs means and covariances only, so its memory does not grow with the
number of samples; kernel distance and precision and recall need all features (N, D).
"""

import numpy as np
import torch
from torch import Tensor

from utils.counts import counted
from utils.devices import in_float64

Features = Tensor | np.ndarray  # (N, D), in any float type; a tensor is worked on where it is


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, as FID defines it: Heusel et al. 2017, eq. 6.

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^1/2), in float64, in squared units of the features.
    With cov1 = A A^T and cov2 = B B^T the last trace is the sum of the singular values of A^T B. Unlike a root of the
    product, this needs no offset on a singular covariance, and rounding enters it linearly, not as a square root:
    with fewer samples than dimensions the distance of a set to itself is still zero.

    Means are (D,), covariances (D, D) symmetric. Raises ValueError when the shapes do not fit each other or a value
    is NaN or infinite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(array, dtype=np.float64) for array in (mean1, cov1, mean2, cov2))
    dim = mean1.size
    if mean1.shape != (dim,) or mean2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        raise ValueError(
            f"Cannot compare statistics of shapes {mean1.shape}, {cov1.shape} and {mean2.shape}, {cov2.shape}: "
            "both must come from the same feature extractor."
        )
    if not all(np.isfinite(array).all() for array in (mean1, cov1, mean2, cov2)):
        raise ValueError("Cannot compare statistics that hold NaN or infinity.")
    overlap = np.linalg.svd(_factor(cov1).T @ _factor(cov2), compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(float(distance), 0.0)  # equal statistics may end at -1e-12


def _factor(cov: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = cov (D, D), without the directions that float64 cannot tell from none."""
    eigenvalues, eigenvectors = np.linalg.eigh(cov)
    kept = eigenvalues > eigenvalues[-1] * len(cov) * np.finfo(np.float64).eps
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])


def rank_warning(count: int | None, dim: int) -> str | None:
    """What to tell a reader of a Frechet distance from `count` samples in `dim` dimensions; None if all is well.

    A covariance of n samples has a rank of n - 1 at most. `count` None (statistics that do not say) gives None.
    """
    if count is None or count > dim:
        return None
    return (
        f"{counted(count, 'sample')} in {counted(dim, 'feature dimension')}: their covariance has a rank of at most "
        f"{max(count - 1, 0)} of {dim}, so the Frechet distance is far above that of many samples. Compare it with "
        f"numbers of the same count only, or use more than {counted(dim, 'sample')}."
    )


def kernel_distance(
    real: Features, generated: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID and its standard error: Binkowski et al. 2018, section 4. Unbiased, so it may be negative.

    The mean over random subsets of the unbiased MMD^2 (Gretton et al. 2012, eq. 3) with the kernel (x.y / D + 1)^3, in
    float64. The error is that of the mean over subsets: it tells how much the draw of subsets matters, not how much
    the samples do, and is about 0 when the subsets are the whole sets.

    Args:
        real, generated: (N, D) and (M, D) features.
        subset_size: samples of each set in a subset, drawn without repetition; cut to the smaller set.
        seed: of the subsets, which are those of torch-fidelity for the same numbers.

    Raises:
        ValueError: fewer than two samples or subsets, or features that do not fit each other.
    """
    real, generated = _pair(real, generated)
    if subsets < 2:
        raise ValueError(f"The kernel distance needs at least 2 subsets for a standard error, found {subsets}.")
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise ValueError(f"The kernel distance needs at least 2 samples of each set in a subset, found {size}.")
    draw = np.random.RandomState(seed)  # the one generator whose stream NumPy promises to keep
    values = []
    for _ in range(subsets):
        x = real[torch.from_numpy(draw.choice(len(real), size, replace=False)).to(real.device)]
        y = generated[torch.from_numpy(draw.choice(len(generated), size, replace=False)).to(real.device)]
        within = sum((kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in (_cubic(x, x), _cubic(y, y)))
        values.append(float(within - 2 * _cubic(x, y).mean()))
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets))


def subset_warning(subset_size: int, *counts: int) -> str | None:
    """What to tell a reader of a kernel distance whose subsets are a whole set; None if all is well."""
    if subset_size < min(counts):
        return None
    return (
        f"subsets of {subset_size} hold all {min(counts)} samples of a set: the standard error of the kernel distance "
        "is that of the other set's draw alone, or 0. Give a smaller --kid_subset_size, or more samples."
    )


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real: Features, generated: Features, *, k: int = 5, chunk: int = 512) -> tuple[float, float]:
    """Improved precision and recall: Kynkaanniemi et al. 2019, eq. 1 and 2.

    A set's manifold is the union of balls around its samples, each reaching to the sample's k-th nearest neighbour
    other than itself. Precision is the share of generated samples inside the real manifold (are they realistic?),
    recall the share of real samples inside the generated one (is everything there?). Both grow as samples get fewer.

    Args:
        real, generated: (N, D) and (M, D) features.
        chunk: rows of a distance matrix held at once; memory is O(chunk * (N + M)).

    Raises:
        ValueError: not more than k samples in a set, or features that do not fit each other.
    """
    real, generated = _pair(real, generated)
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= k:
            raise ValueError(f"Precision and recall with k = {k} need more than {k} {name} samples: {len(features)}.")
    centre = real.mean(dim=0)  # distances stay, and the products they are computed from get small
    real, generated = real - centre, generated - centre
    real_radii = _squared_radii(real, k, chunk)
    generated_radii = _squared_radii(generated, k, chunk)
    is_realistic = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    covered = 0
    for rows, radii in zip(real.split(chunk), real_radii.split(chunk), strict=True):
        distances = _squared_distances(rows, generated)  # (chunk, M)
        is_realistic |= (distances <= radii[:, None]).any(dim=0)
        covered += (distances <= generated_radii).any(dim=1).sum().item()
    return is_realistic.double().mean().item(), covered / len(real)


def _squared_radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """(N, D) -> (N,): squared distance of each sample to its k-th nearest other one."""
    radii = []
    for first in range(0, len(features), chunk):
        distances = _squared_distances(features[first : first + chunk], features)
        distances.diagonal(offset=first).fill_(torch.inf)  # itself
        radii.append(distances.topk(k, largest=False).values[:, -1])  # many times faster than kthvalue
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M), with copies at exactly 0."""
    norms = (x**2).sum(dim=1)[:, None] + (y**2).sum(dim=1)
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances < 1e-13 * norms, 0)  # below is the rounding of the product


def inception_score(probabilities: Features, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score, Salimans et al. 2016: mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))).

    p(y) is the mean of a split, so every split must hold a fair mixture of classes: samples sorted by class, as in a
    folder of folders, would score far too low. So they are shuffled first; split i is then samples i * N // splits to
    (i + 1) * N // splits.

    Args:
        probabilities: (N, classes), rows sum to 1.
        seed: of the order, which is that of torch-fidelity for the same number.

    Raises:
        ValueError: fewer samples than splits, or rows that are no probabilities.
    """
    probabilities = in_float64(torch.as_tensor(probabilities))
    if probabilities.ndim != 2 or not torch.allclose(probabilities.sum(dim=1), torch.ones(()).double(), atol=1e-3):
        raise ValueError(f"Inception Score needs (N, classes) probabilities, found {tuple(probabilities.shape)}.")
    count = len(probabilities)
    if not 1 <= splits <= count:
        raise ValueError(f"Inception Score needs at least one sample per split: {count} samples, {splits} splits.")
    probabilities = probabilities[torch.from_numpy(np.random.RandomState(seed).permutation(count))]
    scores = []
    for i in range(splits):
        part = probabilities[i * count // splits : (i + 1) * count // splits]
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))  # 0 log 0 is 0
        scores.append(divergence.sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(similarities: Features) -> float:
    """Mean of max(cos, 0) over pairs of image and prompt: CLIP score as diffusion papers report it (.30 and the like).

    CLIPScore as Hessel et al. 2021 define it is 2.5 times this, torchmetrics' is 100 times this.
    `similarities` are the (N,) cosines of `ClipScorer`. Raises ValueError without any.
    """
    similarities = in_float64(torch.as_tensor(similarities))
    if similarities.ndim != 1 or len(similarities) == 0:
        raise ValueError(f"CLIP score needs (N,) cosine similarities, found {tuple(similarities.shape)}.")
    return similarities.clamp(min=0).mean().item()


def _pair(real: Features, generated: Features) -> tuple[Tensor, Tensor]:
    """Both as float64 on the device of `real`, or the CPU where that has none."""
    real = in_float64(torch.as_tensor(real))
    generated = in_float64(torch.as_tensor(generated)).to(real.device)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"Cannot compare features of shapes {tuple(real.shape)} and {tuple(generated.shape)}: both must be (N, D) "
            "and come from the same feature extractor."
        )
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("Features contain NaN or infinity; if the extractor runs in half precision, use float32.")
    return real, generated
