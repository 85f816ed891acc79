# SPDX-License-Identifier: Apache-2.0
"""Metrics against closed forms and against clean-fid, prdc and torch-fidelity; streaming statistics against numpy."""

import numpy as np
import pytest
import torch
from cleanfid import fid
from prdc import compute_prdc
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric

from utils.metrics.distances import (
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    rank_warning,
    subset_warning,
)
from utils.metrics.statistics import FeatureStatistics


def random_covariance(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    factor = rng.normal(size=(dim, rank or 2 * dim))
    return factor @ factor.T / factor.shape[1]


def streamed(features: np.ndarray, sizes: list[int]) -> FeatureStatistics:
    assert sum(sizes) == len(features)
    statistics, start = FeatureStatistics(), 0
    for size in sizes:
        statistics.update(features[start : start + size])
        start += size
    return statistics


def moments(statistics: FeatureStatistics) -> tuple[np.ndarray, np.ndarray]:
    return statistics.mean, statistics.cov


# ---------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_of_identical_statistics_is_zero():
    rng = np.random.default_rng(0)
    mean, cov = rng.normal(size=64), random_covariance(rng, 64)
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-6


def test_frechet_of_isotropic_gaussians():
    dim, mean1, mean2 = 5, np.zeros(5), np.full(5, 2.0)
    # |2 * ones(5)|^2 + 5 * (3 - 1)^2
    assert frechet_distance(mean1, 9 * np.eye(dim), mean2, np.eye(dim)) == pytest.approx(20 + 20, abs=1e-10)


def test_frechet_of_diagonal_gaussians():
    rng = np.random.default_rng(1)
    mean1, mean2, std1, std2 = rng.normal(size=7), rng.normal(size=7), rng.uniform(0, 3, 7), rng.uniform(0, 3, 7)
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2)) == pytest.approx(expected, abs=1e-10)


def test_frechet_of_commuting_covariances():
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    std1, std2 = rng.uniform(0.1, 3, 9), rng.uniform(0.1, 3, 9)
    cov1, cov2 = basis * std1**2 @ basis.T, basis * std2**2 @ basis.T
    expected = ((std1 - std2) ** 2).sum()
    assert frechet_distance(np.zeros(9), cov1, np.zeros(9), cov2) == pytest.approx(expected, abs=1e-10)


def test_frechet_of_2x2_covariances_that_do_not_commute():
    cov1, cov2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    product = cov1 @ cov2
    assert not np.allclose(product, product.T)
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))  # Cayley-Hamilton
    expected = 5 + 5 - 2 * root_trace
    assert frechet_distance(np.zeros(2), cov1, np.zeros(2), cov2) == pytest.approx(expected, abs=1e-12)


def test_frechet_agrees_with_the_matrix_square_root_and_is_symmetric():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(3)
    mean1, cov1 = rng.normal(size=32), random_covariance(rng, 32)
    mean2, cov2 = rng.normal(size=32), random_covariance(rng, 32)
    root = linalg.sqrtm(cov1 @ cov2)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root).real
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, abs=1e-8)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, abs=1e-8)


def test_frechet_of_rank_deficient_covariances():
    rng = np.random.default_rng(4)
    cov = random_covariance(rng, 40, rank=5)
    assert frechet_distance(np.zeros(40), cov, np.zeros(40), cov) < 1e-5
    # cov1 and 4 cov1 commute: the distance is the trace of (2 - 1)^2 cov1
    assert frechet_distance(np.zeros(40), cov, np.zeros(40), 4 * cov) == pytest.approx(np.trace(cov), abs=1e-5)
    assert frechet_distance(np.zeros(40), 0 * cov, np.zeros(40), cov) == pytest.approx(np.trace(cov), abs=1e-10)


@pytest.mark.parametrize("count", [500, 30])  # more and fewer samples than the 48 dimensions
def test_frechet_agrees_with_clean_fid(count):
    rng = np.random.default_rng(8)
    real = rng.normal(size=(600, 48)) @ rng.normal(size=(48, 48))
    generated = rng.normal(size=(count, 48)) @ rng.normal(size=(48, 48)) + rng.normal(size=48)
    first, second = streamed(real, [600]), streamed(generated, [count // 2] * 2)
    ours = frechet_distance(*moments(first), *moments(second))
    scale = np.trace(first.cov) + np.trace(second.cov)
    assert ours == pytest.approx(fid.fid_from_feats(real, generated), abs=1e-8 * scale)  # theirs errs when singular
    # The trace of the root from the samples themselves, without covariances: the sum of singular values of X Y^T.
    x, y = ((features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (real, generated))
    root_trace = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((first.mean - second.mean) ** 2).sum() + scale - 2 * root_trace
    assert ours == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("spread", ["flat", "decaying"])
@pytest.mark.parametrize("count, dim", [(1000, 300), (301, 300), (200, 300)])
def test_frechet_of_a_set_to_itself(count, dim, spread):
    rng = np.random.default_rng(9)
    features = 30 * rng.normal(size=(count, dim)) / (1 if spread == "flat" else 1 + np.arange(dim) ** 2)
    # The same set in another order: equal up to rounding, as the reference and the samples of an ideal generator.
    first, second = streamed(features, [count]), streamed(features[::-1], [1, count - 1])
    limit = 1e-6 if count > dim else 1e-7 * np.trace(first.cov)
    assert frechet_distance(*moments(first), *moments(second)) < limit


def test_frechet_of_fewer_samples_than_dimensions_to_themselves():
    features = np.random.default_rng(10).exponential(size=(200, 800)) * np.linspace(0, 2, 800)
    statistics = streamed(features, [200])
    assert frechet_distance(*moments(statistics), *moments(statistics)) < 1e-7 * np.trace(statistics.cov)
    # cov and 4 cov commute: the trace of (2 - 1)^2 cov. Not clipped at 0, so it shows an error of either sign.
    ours = frechet_distance(statistics.mean, statistics.cov, statistics.mean, 4 * statistics.cov)
    assert ours == pytest.approx(np.trace(statistics.cov), rel=1e-10)


def test_a_rank_warning_names_rank_and_dimension():
    assert rank_warning(2049, 2048) is None and rank_warning(None, 2048) is None
    text = rank_warning(500, 2048)
    assert "500 samples" in text and "rank of at most 499 of 2048" in text
    assert "2047 of 2048" in rank_warning(2048, 2048)
    rank = np.linalg.matrix_rank(np.cov(np.random.default_rng(11).normal(size=(6, 9)), rowvar=False))
    assert f"rank of at most {rank} of 9" in rank_warning(6, 9)


def test_frechet_refuses_statistics_of_two_extractors():
    with pytest.raises(ValueError, match="same feature extractor"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="same feature extractor"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.full((3, 3), np.nan))


# ------------------------------------------------------------------------------------------ streaming statistics


@pytest.mark.parametrize("offset, tolerance", [(0.0, 1e-12), (1e6, 1e-8)])
@pytest.mark.parametrize("sizes", [[100], [1] * 100, [1, 40, 0, 7, 52], [0, 99, 1]])
def test_statistics_equal_numpy_for_uneven_batches(offset, tolerance, sizes):
    rng = np.random.default_rng(5)
    spread = rng.normal(size=(100, 6)) @ rng.normal(size=(6, 6))
    statistics = streamed(spread + offset, sizes)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, spread.mean(axis=0) + offset, rtol=1e-14, atol=1e-13)
    # With the offset the features themselves are rounded to 1e-10; sums of squares would be off by 1e-3.
    np.testing.assert_allclose(statistics.cov, np.cov(spread, rowvar=False), rtol=0, atol=tolerance)


def test_statistics_accept_tensors_and_accumulate_in_float64():
    rng = np.random.default_rng(6)
    features = (rng.normal(size=(50, 3)) + 100).astype(np.float32)
    from_numpy, from_torch = FeatureStatistics(), FeatureStatistics()
    from_numpy.update(features.astype(np.float64))
    from_torch.update(torch.from_numpy(features).requires_grad_())
    assert from_torch.cov.dtype == np.float64
    np.testing.assert_array_equal(from_torch.cov, from_numpy.cov)
    np.testing.assert_array_equal(from_torch.mean, from_numpy.mean)


def test_statistics_do_not_change_what_they_were_given_or_gave():
    features = np.arange(6.0).reshape(3, 2)
    statistics = streamed(features, [3])
    mean, cov = statistics.mean, statistics.cov
    kept = mean.copy(), cov.copy()
    statistics.update(features + 5)
    np.testing.assert_array_equal(features, np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(cov, kept[1])


def test_statistics_refuse_what_they_cannot_use():
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match="no mean"):
        _ = statistics.mean
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        statistics.update(np.zeros(3))
    statistics.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        _ = statistics.cov
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        statistics.update(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="NaN"):
        statistics.update(np.full((1, 3), np.nan))
    assert statistics.count == 1


def test_statistics_saved_and_loaded_are_the_same_bits(tmp_path):
    statistics = streamed(np.random.default_rng(7).normal(size=(20, 4)), [13, 7])
    path = tmp_path / "reference.stats"  # a name of the caller's choice, nothing is appended
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.count == 20
    np.testing.assert_array_equal(loaded.mean, statistics.mean)
    np.testing.assert_array_equal(loaded.cov, statistics.cov)
    with np.load(path) as arrays:  # by the names that clean-fid and pytorch-fid look for
        np.testing.assert_array_equal(arrays["mu"], statistics.mean)
        np.testing.assert_array_equal(arrays["sigma"], statistics.cov)
    with pytest.raises(AssertionError, match="no more samples"):
        loaded.update(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        streamed(np.zeros((1, 4)), [1]).save(path)


def test_loading_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do not exist"):
        FeatureStatistics.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    np.savez(tmp_path / "protocol.npz", count=3, mu=np.zeros(3), sigma=np.eye(3), protocol="{not json")
    np.savez(tmp_path / "shapes.npz", count=3, mu=np.zeros((3, 1)), sigma=np.eye(3))
    np.savez(tmp_path / "pickled.npz", count=3, mu=np.array([object()]), sigma=np.eye(1))
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("other", "foreign", "nan", "protocol", "shapes", "pickled", "text"):
        with pytest.raises(ValueError, match="does not hold feature statistics"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def test_the_protocol_is_saved_with_the_statistics(tmp_path):
    protocol = {
        "extractor": {"name": "inception", "sha256": {"a.pt": "0f"}},
        "samples": 3,
        "crop": None,
        "mean": [0.5],
    }
    statistics = streamed(np.eye(3), [3])
    statistics.protocol = protocol
    statistics.save(tmp_path / "with.npz")
    assert FeatureStatistics.load(tmp_path / "with.npz").protocol == protocol
    with np.load(tmp_path / "with.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays)


def test_statistics_of_other_tools_are_read(tmp_path):
    rng = np.random.default_rng(12)
    features = rng.normal(size=(40, 5)) + 3
    np.savez(tmp_path / "theirs.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False), extra=np.ones(2))
    theirs, ours = FeatureStatistics.load(tmp_path / "theirs.npz"), streamed(features, [40])
    assert theirs.count is None and theirs.protocol is None
    np.testing.assert_allclose(theirs.mean, ours.mean, rtol=1e-14)
    np.testing.assert_allclose(theirs.cov, ours.cov, rtol=1e-12)
    theirs.protocol = {"extractor": "inception"}
    theirs.save(tmp_path / "again.npz")
    again = FeatureStatistics.load(tmp_path / "again.npz")
    np.testing.assert_array_equal(again.cov, theirs.cov)
    assert again.count is None and again.protocol == theirs.protocol


# ----------------------------------------------------------------------------------------------- kernel distance


@pytest.fixture
def two_sets() -> tuple[np.ndarray, np.ndarray]:
    """(90, 12) and (70, 12) float32, with means and spreads of their own."""
    rng = np.random.default_rng(14)
    return rng.normal(size=(90, 12)).astype(np.float32), (1.5 * rng.normal(size=(70, 12)) + 0.4).astype(np.float32)


def test_kernel_distance_agrees_with_torch_fidelity(two_sets):
    real, generated = (torch.from_numpy(features).double() for features in two_sets)
    theirs = kid_features_to_metric(real, generated, kid_subsets=20, kid_subset_size=50, rng_seed=3, verbose=False)
    mean, error = kernel_distance(*two_sets, subsets=20, subset_size=50, seed=3)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    spread = theirs["kernel_inception_distance_std"] * np.sqrt(20 / 19)  # theirs divides by 20
    assert error == pytest.approx(spread / np.sqrt(20), rel=1e-10)
    assert kernel_distance(*two_sets, subsets=20, subset_size=50, seed=3) == (mean, error)
    assert kernel_distance(*two_sets, subsets=20, subset_size=50, seed=4) != (mean, error)


def test_kernel_distance_of_whole_sets_is_the_plain_estimate(two_sets):
    real, generated = two_sets[0][:70].astype(np.float64), two_sets[1].astype(np.float64)
    mean, error = kernel_distance(real, generated, subsets=2, subset_size=1000)  # cut to 70: every subset is the set
    assert mean == pytest.approx(kernel_mmd(real, generated), rel=1e-10)
    assert error < 1e-12
    pairs = [(i, j) for i in range(70) for j in range(70) if i != j]
    kernel = lambda x, y: (x @ y / 12 + 1) ** 3  # noqa: E731
    within = np.mean([kernel(real[i], real[j]) + kernel(generated[i], generated[j]) for i, j in pairs])
    across = np.mean([kernel(x, y) for x in real for y in generated])
    assert mean == pytest.approx(within - 2 * across, rel=1e-10)


def test_a_subset_warning_when_subsets_are_a_whole_set():
    assert subset_warning(1000, 5000, 1001) is None
    assert "subsets of 1000 hold all 1000 samples" in subset_warning(1000, 1000, 5000)
    assert "hold all 20 samples" in subset_warning(1000, 24, 20)


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(15)
    draws = [kernel_distance(rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), subsets=2)[0] for _ in range(400)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error < 0.1  # with the diagonals the mean would be 1.1
    assert min(draws) < 0


# -------------------------------------------------------------------------------------------- precision and recall


def mode_dropping() -> tuple[np.ndarray, np.ndarray]:
    """Real samples of three modes, generated ones of one of them and a few stray ones: float32 (450, 6), (330, 6)."""
    rng = np.random.default_rng(16)
    centres = np.array([[0.0] * 6, [8.0] * 6, [-8.0] * 6])
    real = np.concatenate([centre + rng.normal(size=(150, 6)) for centre in centres])
    generated = np.concatenate([0.9 * rng.normal(size=(300, 6)), 40 + rng.normal(size=(30, 6))])
    return real.astype(np.float32), generated.astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [7, 512])
def test_precision_and_recall_agree_with_prdc(k, chunk, capsys):
    real, generated = mode_dropping()
    theirs = compute_prdc(real.astype(np.float64), generated.astype(np.float64), nearest_k=k)
    precision, recall = precision_recall(real, generated, k=k, chunk=chunk)
    assert precision == pytest.approx(theirs["precision"], abs=1e-12)
    assert recall == pytest.approx(theirs["recall"], abs=1e-12)


def test_precision_is_high_and_recall_low_when_modes_are_dropped():
    real, generated = mode_dropping()
    precision, recall = precision_recall(real, generated)
    assert precision > 0.8 and recall < 0.35
    assert precision_recall(generated, real) == (recall, precision)


def test_precision_and_recall_of_tight_clusters_far_apart_and_far_from_the_origin(capsys):
    real, generated = (np.round(features.astype(np.float64) * 256) / 256 for features in mode_dropping())
    apart = np.where(np.arange(450) % 2, 1000, -1000)[:, None]
    real, generated = real + apart, generated + apart[:330]
    theirs = compute_prdc(real, generated, nearest_k=5)
    expected = (theirs["precision"], theirs["recall"])
    assert 0.1 < expected[1] < expected[0] < 0.95
    assert precision_recall(real, generated) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real + 2**22, generated + 2**22) == pytest.approx(expected, abs=1e-12)  # exact in float64


@pytest.mark.parametrize("chunk", [1, 13, 512])  # products of other shapes are rounded otherwise
def test_copies_are_inside_balls_of_no_size(chunk):
    samples = np.random.default_rng(18).normal(size=(40, 300))
    copies = np.repeat(samples[:20], 7, axis=0)  # more of each than k
    assert precision_recall(copies, copies, chunk=chunk) == (1, 1)
    assert precision_recall(copies, samples[:20], chunk=chunk) == (1, 1)
    assert precision_recall(np.repeat(samples, 7, axis=0), samples[:11], chunk=chunk)[0] == 1
    assert precision_recall(copies, np.concatenate([samples[5:20], samples[20:]]), chunk=chunk)[0] == 15 / 35
    assert precision_recall(copies + 1e-3, samples[:20], chunk=chunk)[0] == 0


# ------------------------------------------------------------------------------------------------ Inception Score


@pytest.mark.parametrize("count, splits", [(400, 10), (103, 7), (12, 1)])
def test_inception_score_agrees_with_torch_fidelity(count, splits):
    logits = 2 * torch.randn(count, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(17))
    theirs = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=3)
    mean, spread = inception_score(logits.softmax(dim=1), splits=splits, seed=3)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_inception_score_does_not_depend_on_a_sorted_folder():
    probabilities = np.eye(10).repeat(50, axis=0)  # class after class
    assert inception_score(probabilities)[0] > 9
    assert inception_score(probabilities, seed=1) != inception_score(probabilities)


def test_inception_score_of_sure_and_of_clueless_classifiers():
    sure = np.eye(5)[np.arange(100) % 5]  # exact zeros: 0 log 0
    assert inception_score(sure, splits=1) == pytest.approx((5, 0))
    assert inception_score(np.full((100, 5), 0.2), splits=4) == pytest.approx((1, 0))


# ----------------------------------------------------------------------------------------------------- CLIP score


def test_clip_score_is_the_mean_cosine_clipped_at_zero():
    assert clip_score(torch.tensor([0.3, -0.5, 0.1, 0.2])) == pytest.approx(0.15)


# ------------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_measured_is_refused():
    few, many = np.zeros((5, 3)), np.zeros((9, 3))
    for metric in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="same feature extractor"):
            metric(many, np.zeros((9, 4)))
        with pytest.raises(ValueError, match="NaN"):
            metric(many, np.full((9, 3), np.nan))
    with pytest.raises(ValueError, match="more than 5 generated samples: 5"):
        precision_recall(many, few)
    with pytest.raises(ValueError, match="more than 5 real samples: 5"):
        precision_recall(few, many)
    with pytest.raises(ValueError, match="at least 2 samples.*found 1"):
        kernel_distance(many, few[:1])
    with pytest.raises(ValueError, match="at least 2 subsets"):
        kernel_distance(many, many, subsets=1)
    with pytest.raises(ValueError, match="5 samples, 10 splits"):
        inception_score(np.full((5, 4), 0.25))
    with pytest.raises(ValueError, match="probabilities"):
        inception_score(np.ones((20, 4)))
    with pytest.raises(ValueError, match="found \\(0,\\)"):
        clip_score(np.zeros(0))
