# SPDX-License-Identifier: Apache-2.0
"""Frechet distance against closed forms, streaming statistics against numpy, features against a manual forward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from utils.extractors import FeatureExtractor
from utils.metrics import FeatureStatistics, frechet_distance

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def random_covariance(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    factor = rng.normal(size=(dim, rank or 2 * dim))
    return factor @ factor.T / factor.shape[1]


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


def test_frechet_refuses_statistics_of_two_extractors():
    with pytest.raises(ValueError, match="same feature extractor"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="same feature extractor"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.ones(3))


# ------------------------------------------------------------------------------------------ streaming statistics


def streamed(features: np.ndarray, sizes: list[int]) -> FeatureStatistics:
    assert sum(sizes) == len(features)
    statistics, start = FeatureStatistics(), 0
    for size in sizes:
        statistics.update(features[start : start + size])
        start += size
    return statistics


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


def test_statistics_saved_and_loaded_go_on_to_the_same_bits(tmp_path):
    features = np.random.default_rng(7).normal(size=(30, 4))
    statistics = streamed(features[:20], [13, 7])
    path = tmp_path / "reference.stats"  # a name of the caller's choice, nothing is appended
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    for each in (statistics, loaded):
        each.update(features[20:])
    assert loaded.count == 30
    np.testing.assert_array_equal(loaded.mean, statistics.mean)
    np.testing.assert_array_equal(loaded.cov, statistics.cov)


def test_loading_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do not exist"):
        FeatureStatistics.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "shapes.npz", count=3, mean=np.zeros(3), scatter=np.eye(4))
    np.savez(tmp_path / "pickled.npz", count=3, mean=np.array([object()]), scatter=np.eye(1))
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("other", "shapes", "pickled", "text"):
        with pytest.raises(ValueError, match="does not hold feature statistics"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


# --------------------------------------------------------------------------------------------- feature extractor

MEAN, STD = [0.3, 0.5, 0.6], [0.2, 0.5, 0.4]  # different per channel, so that a swapped or skipped one shows


def save_processor(folder: Path, **changes) -> None:
    ViTImageProcessor(**{"do_resize": False, "image_mean": MEAN, "image_std": STD, **changes}).save_pretrained(folder)


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # other than the batch's own, so that train mode shows
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_features_equal_a_manual_forward(resnet_folder, images):
    model = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    with torch.no_grad():
        expected = model.resnet(normalise(images)).last_hidden_state.mean(dim=(2, 3))
    features = FeatureExtractor(str(resnet_folder))(images)
    assert features.shape == (5, 12) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_features_use_the_models_own_resize(resnet_folder, images, tmp_path):
    ResNetForImageClassification.from_pretrained(resnet_folder).save_pretrained(tmp_path)
    save_processor(tmp_path, do_resize=True, size={"height": 24, "width": 24})
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    one_by_one = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    assert one_by_one.shape == (5, 3, 24, 24)
    model = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.resnet(one_by_one).pooler_output.flatten(1)
    torch.testing.assert_close(FeatureExtractor(str(tmp_path))(images), expected, rtol=1e-5, atol=1e-5)


def test_grayscale_is_repeated_to_three_channels(resnet_folder, images):
    extractor = FeatureExtractor(str(resnet_folder))
    gray = images[:, :1]
    torch.testing.assert_close(extractor(gray), extractor(gray.repeat(1, 3, 1, 1)), rtol=0, atol=0)


def test_features_do_not_depend_on_a_surrounding_autocast(resnet_folder, images):
    extractor = FeatureExtractor(str(resnet_folder))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(images)
    torch.testing.assert_close(inside, extractor(images), rtol=0, atol=0)


def test_half_precision_forward_gives_float32_features(resnet_folder, images):
    features = FeatureExtractor(str(resnet_folder), dtype=torch.bfloat16)(images)
    exact = FeatureExtractor(str(resnet_folder))(images)
    assert features.dtype == torch.float32
    assert not torch.equal(features, exact)  # the forward really ran in bfloat16
    torch.testing.assert_close(features, exact, rtol=0.1, atol=0.1)


def test_images_must_be_uint8_with_one_or_three_channels(resnet_folder, images):
    extractor = FeatureExtractor(str(resnet_folder))
    with pytest.raises(AssertionError, match="uint8"):
        extractor(images.float() / 255)
    with pytest.raises(AssertionError, match="1 or 3"):
        extractor(images[:, :2])


def tiny_vit(**changes) -> ViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTConfig(**{**sizes, "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.5, **changes})


def test_a_trained_pooler_is_used(images, tmp_path):
    model = ViTModel(tiny_vit()).eval()
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    with torch.no_grad():
        expected = model(normalise(images)).pooler_output
    torch.testing.assert_close(FeatureExtractor(str(tmp_path))(images), expected, rtol=1e-5, atol=1e-5)


def test_a_pooler_without_weights_is_replaced_by_the_mean_over_tokens(images, tmp_path):
    model = ViTForImageClassification(tiny_vit()).eval()  # saves no pooler; AutoModel adds one with random weights
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    with torch.no_grad():
        expected = model.vit(normalise(images)).last_hidden_state.mean(dim=1)
    for _ in range(2):
        torch.testing.assert_close(FeatureExtractor(str(tmp_path))(images), expected, rtol=1e-5, atol=1e-5)


def test_clip_gives_its_image_embedding(images, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 20}, vision_config=vision, projection_dim=6))
    model.eval().save_pretrained(tmp_path)
    save_processor(tmp_path)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(normalise(images)).pooler_output)
    torch.testing.assert_close(FeatureExtractor(str(tmp_path))(images), expected, rtol=1e-5, atol=1e-5)


def test_a_processor_of_the_pil_kind_gives_the_same_features(resnet_folder, images):
    extractor = FeatureExtractor(str(resnet_folder))
    expected = extractor(images)
    extractor.processor = AutoImageProcessor.from_pretrained(resnet_folder, backend="pil")
    assert extractor.processor.backend == "pil"
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="--validation_feature_extractor.*absent.*no directory"):
        FeatureExtractor(str(tmp_path / "absent"))


def test_what_is_no_image_model_is_refused(resnet_folder, tmp_path):
    flag = "--validation_feature_extractor"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{flag}.*preprocessor_config.json"):
        FeatureExtractor(str(tmp_path / "empty"))

    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=f"{flag}.*preprocessor_config.json"):
        FeatureExtractor(str(tmp_path / "text"))
    save_processor(tmp_path / "text")
    with pytest.raises(ValueError, match=f"{flag}.*BertModel.*images"):
        FeatureExtractor(str(tmp_path / "text"))

    ViTModel(tiny_vit(num_channels=1)).save_pretrained(tmp_path / "gray")
    save_processor(tmp_path / "gray")
    with pytest.raises(ValueError, match=f"{flag}.*1 channels"):
        FeatureExtractor(str(tmp_path / "gray"))


def test_missing_weights_and_pickles_are_refused(resnet_folder, tmp_path):
    flag = "--validation_feature_extractor"
    model = ResNetForImageClassification.from_pretrained(resnet_folder)
    state = {name: value for name, value in model.state_dict().items() if "encoder.stages.1" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    save_processor(tmp_path / "part")
    with pytest.raises(ValueError, match=f"{flag}.*lack.*encoder.stages.1"):
        FeatureExtractor(str(tmp_path / "part"))

    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    save_processor(tmp_path / "pickle")
    with pytest.raises(ValueError, match=f"{flag}.*could not be loaded"):
        FeatureExtractor(str(tmp_path / "pickle"))


# ------------------------------------------------------------------------------------------------ bundled assets


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    from datasets import load_dataset

    return load_dataset(str(ASSETS / "fashion_mnist_16"), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def test_split(bundled) -> tuple[torch.Tensor, torch.Tensor]:
    """(10000, 1, 16, 16) uint8 images and (10000,) labels."""
    images = np.stack([np.asarray(image) for image in bundled["test"]["image"]])
    return torch.from_numpy(images)[:, None], torch.tensor(bundled["test"]["label"])


def test_bundled_data_are_16x16_grayscale_with_names(bundled):
    assert {split: len(rows) for split, rows in bundled.items()} == {"train": 10_000, "test": 10_000}
    for rows in bundled.values():
        assert rows.features["label"].names[0] == "T-shirt/top" and rows.features["label"].num_classes == 10
        assert set(rows["label"]) == set(range(10))
        for image in rows[:50]["image"]:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (16, 16))
    assert "Copyright (c) 2017 Zalando SE" in (ASSETS / "fashion_mnist_16" / "LICENSE").read_text()


def test_bundled_splits_share_almost_no_image(bundled):
    train, test = ({np.asarray(image).tobytes() for image in rows["image"]} for rows in bundled.values())
    assert len(train) > 9_900 and len(test) > 9_900
    assert len(train & test) < 10


def test_bundled_classifier_knows_its_images(test_split):
    images, labels = test_split
    model = AutoModelForImageClassification.from_pretrained(ASSETS / "classifier", use_safetensors=True).eval()
    processor = AutoImageProcessor.from_pretrained(ASSETS / "classifier")
    assert model.config.id2label[9] == "Ankle boot"
    correct = 0
    with torch.inference_mode():
        for batch, label in zip(images.split(500), labels.split(500), strict=True):
            pixels = processor(batch.repeat(1, 3, 1, 1), return_tensors="pt", disable_grouping=False).pixel_values
            correct += (model(pixels).logits.argmax(dim=1) == label).sum().item()
    assert correct / len(labels) > 0.88


def test_bundled_features_have_full_rank_and_tell_noise_from_clothes(test_split):
    images, _ = test_split
    extractor = FeatureExtractor(str(ASSETS / "classifier"))
    halves, noise = (FeatureStatistics(), FeatureStatistics()), FeatureStatistics()
    for index, batch in enumerate(images.split(500)):
        halves[index % 2].update(extractor(batch))
    eigenvalues = np.linalg.eigvalsh(halves[0].cov)
    assert eigenvalues.size == 64
    assert eigenvalues[0] / eigenvalues[-1] > 1e-6
    assert np.diag(halves[0].cov).min() > 1e-2  # no dead feature

    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        noise.update(extractor(torch.randint(0, 256, (500, 1, 16, 16), generator=generator, dtype=torch.uint8)))
    same = frechet_distance(halves[0].mean, halves[0].cov, halves[1].mean, halves[1].cov)
    other = frechet_distance(halves[0].mean, halves[0].cov, noise.mean, noise.cov)
    assert same < 0.5 < 20 < other
