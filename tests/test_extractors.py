# SPDX-License-Identifier: Apache-2.0
"""Features against a manual forward and against clean-fid on folders of images; CLIP against its own logits."""

import io
import json
import shutil
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid, inception_pytorch
from cleanfid.features import build_feature_extractor
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from utils.evaluation.parallel import mapping
from utils.metrics.clip import ClipScorer
from utils.metrics.distances import clip_score, frechet_distance
from utils.metrics.extractors import FeatureExtractor, extractor_identity, load_extractor
from utils.metrics.inception import InceptionExtractor
from utils.metrics.statistics import FeatureStatistics

ASSETS = Path(__file__).resolve().parent.parent / "assets"


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


# ------------------------------------------------------------------------------- classes, and what identifies a model


def test_probabilities_are_the_classifiers_and_features_stay_the_same(resnet_folder, images):
    extractor = load_extractor(str(resnet_folder), with_probabilities=True)
    calls = []
    extractor.body.register_forward_hook(lambda *args: calls.append(1))
    features, probabilities = extractor.features_and_probabilities(images)
    assert len(calls) == 1
    model = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    with torch.no_grad():
        expected = model(normalise(images)).logits.softmax(dim=1)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)
    for other in (extractor(images), load_extractor(str(resnet_folder))(images)):
        torch.testing.assert_close(features, other, rtol=0, atol=0)


def test_threads_measure_what_one_measures(resnet_folder, clip_folder):
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8) for _ in range(40)]
    prompts = [["a b"] * 3, ["a"] * 3, ["b a d"] * 3, ["a b d a c a b"] * 3] * 10
    extractor, scorer = load_extractor(str(resnet_folder), with_probabilities=True), ClipScorer(str(clip_folder))

    def measure(batch, texts):
        return *extractor.features_and_probabilities(batch), scorer(batch, texts)

    expected = list(map(measure, batches, prompts))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change as often as they can
    try:
        with mapping(4) as map_blocks:
            together = list(map_blocks(measure, batches, prompts))
    finally:
        sys.setswitchinterval(interval)
    for found, alone in zip(together, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_features_of_a_vit_classifier_are_the_same_with_probabilities(images, tmp_path):
    ViTForImageClassification(tiny_vit(num_labels=4)).save_pretrained(tmp_path)
    save_processor(tmp_path)
    alone, both = load_extractor(str(tmp_path)), load_extractor(str(tmp_path), with_probabilities=True)
    features, probabilities = both.features_and_probabilities(images)
    assert probabilities.shape == (5, 4)
    torch.testing.assert_close(features, alone(images), rtol=0, atol=0)
    assert alone.protocol == both.protocol and alone.protocol["kind"].endswith("mean of last_hidden_state")


def test_a_model_without_classifier_gives_no_probabilities(tmp_path):
    ViTModel(tiny_vit()).save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match="--feature_extractor.*ViTModel.*no classifier head"):
        load_extractor(str(tmp_path), with_probabilities=True)


def test_the_protocol_identifies_weights_and_preprocessing_but_no_folder(resnet_folder, tmp_path):
    model = ResNetForImageClassification.from_pretrained(resnet_folder)
    for name in ("copy", "weights", "resize", "mean"):
        if name == "weights":
            model.resnet.embedder.embedder.convolution.weight.data[0] += 1e-3
        model.save_pretrained(tmp_path / name)
        model = ResNetForImageClassification.from_pretrained(resnet_folder)
        changes = {"resize": {"do_resize": True, "size": {"height": 9, "width": 8}}, "mean": {"image_mean": STD}}
        save_processor(tmp_path / name, **changes.get(name, {}))
    protocol = load_extractor(str(resnet_folder)).protocol
    assert protocol["dimensions"] == 12 and protocol["name"] == resnet_folder.name
    assert json.loads(json.dumps(protocol)) == protocol
    assert str(resnet_folder.parent) not in json.dumps(protocol) and "/" not in json.dumps(protocol)
    identity = extractor_identity(protocol)
    assert extractor_identity(load_extractor(str(tmp_path / "copy")).protocol) == identity
    for name in ("weights", "resize", "mean"):
        assert extractor_identity(load_extractor(str(tmp_path / name)).protocol) != identity
    resized = load_extractor(str(tmp_path / "resize"))
    assert resized.protocol["resize"] == "9x8 resize, torchvision"
    half = FeatureExtractor(str(resnet_folder), dtype=torch.bfloat16)
    assert extractor_identity(half.protocol) != identity


def test_a_hub_id_is_identified_by_the_files_of_its_snapshot(resnet_folder, images, monkeypatch, tmp_path):
    repository = tmp_path / "models--someone--resnet"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(resnet_folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from_hub, from_folder = load_extractor("someone/resnet"), load_extractor(str(resnet_folder))
    assert from_hub.protocol["name"] == "someone/resnet"
    assert extractor_identity(from_hub.protocol) == extractor_identity(from_folder.protocol)
    torch.testing.assert_close(from_hub(images), from_folder(images), rtol=0, atol=0)


# --------------------------------------------------------------------------------------- clean-fid, folders of images


class TinyInception(torch.nn.Module):
    """The parts of NVIDIA's TorchScript that clean-fid uses: `layers`, (B, 3, 299, 299) -> 2048 numbers; `output`."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.Tanh(),
            torch.nn.AdaptiveAvgPool2d((32, 16)),  # 4 * 32 * 16 = 2048
        )
        self.output = torch.nn.Linear(2048, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


@pytest.fixture(scope="module")
def tiny_inception(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(2)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(TinyInception()).save(folder / "inception-2015-12-05.pt")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Two folders of 24 PNG images of odd sizes: smaller and larger than 299, rough and smooth, colour and grey."""
    rng = np.random.default_rng(3)
    paths = []
    for dim in (0, 1):
        folder = tmp_path_factory.mktemp("images")
        for i in range(24):
            height, width = ((31, 47), (299, 299), (340, 301), (64, 333))[i % 4]
            coarse = rng.integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            noise = rng.integers(0, 60 + 100 * dim, size=(height, width, 3))
            image = Image.fromarray(np.clip(np.asarray(image) * (0.9 - 0.2 * dim) + noise, 0, 255).astype(np.uint8))
            (image.convert("L") if i % 5 == 4 else image).save(folder / f"{i:02d}.png")
        paths.append(str(folder))
    return tuple(paths)


def read(folder: str) -> list[torch.Tensor]:
    """Uint8 (1, 1 or 3, H, W) of every PNG, as a caller of ours would hand them in."""
    images = [np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())]
    return [torch.from_numpy(np.array(i)).reshape(*i.shape[:2], -1).permute(2, 0, 1)[None] for i in images]


def clean_fid_features(folder: str, model, mode: str) -> np.ndarray:
    with warnings.catch_warnings():  # clean-fid silences all of them for good
        return fid.get_folder_features(
            folder, model, num_workers=0, batch_size=1, device=torch.device("cpu"), mode=mode, verbose=False
        )


def test_clean_features_of_a_folder_equal_clean_fids(tiny_inception, folders):
    extractor = load_extractor("inception", inception_path=str(tiny_inception))
    theirs = clean_fid_features(folders[0], InceptionV3W(str(tiny_inception), download=False), "clean")
    ours = torch.cat([extractor(image) for image in read(folders[0])])
    assert ours.shape == (24, 2048) and ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_frechet_distance_of_two_folders_equals_clean_fids_fid(tiny_inception, folders):
    """20 of the 2048 features, as clean-fid's matrix root is exact only if there are fewer of them than images."""
    model = InceptionV3W(str(tiny_inception), download=False)
    some = slice(0, 2048, 103)
    with warnings.catch_warnings():
        theirs = fid.compute_fid(
            *folders,
            mode="clean",
            num_workers=0,
            device=torch.device("cpu"),
            custom_feat_extractor=lambda x: model(x)[:, some].double(),  # or it takes the mean in float32
            verbose=False,
        )
    extractor, statistics = load_extractor("inception", inception_path=str(tiny_inception)), []
    for folder in folders:
        statistics.append(FeatureStatistics())
        for image in read(folder):
            statistics[-1].update(extractor(image)[:, some])
    ours = frechet_distance(statistics[0].mean, statistics[0].cov, statistics[1].mean, statistics[1].cov)
    assert theirs > 1e-2 and ours == pytest.approx(theirs, rel=1e-8)


def test_resizing_does_not_depend_on_the_batch(tiny_inception, images):
    extractor = load_extractor("inception", inception_path=str(tiny_inception))
    one_by_one = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(extractor(images), one_by_one, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(extractor(images[:, :1]), extractor(images[:, :1].repeat(1, 3, 1, 1)), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extractor(images), extractor(images), rtol=0, atol=0)
        inside = extractor(images)
    torch.testing.assert_close(inside, extractor(images), rtol=0, atol=0)


def test_inception_probabilities_leave_the_output_bias_out(tiny_inception, images):
    extractor = load_extractor("inception", inception_path=str(tiny_inception), with_probabilities=True)
    features, probabilities = extractor.features_and_probabilities(images)
    torch.testing.assert_close(features, extractor(images), rtol=0, atol=0)
    output = torch.jit.load(tiny_inception / "inception-2015-12-05.pt").output
    assert output.bias.abs().min() > 0
    with torch.no_grad():
        expected = (output(features) - output.bias).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def legacy_weights(tmp_path_factory) -> Path:
    """Random weights of pytorch-fid's whole network, where torch.hub would put them: <folder>/checkpoints/<name>."""
    name = "pt_inception-2015-12-05-6726825d.pth"
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    state = {}
    patch = pytest.MonkeyPatch()
    with patch.context() as context, warnings.catch_warnings(action="ignore"):
        # The state dict of the network as it is built; clean-fid has no other way to its full set of names.
        context.setattr(torch.nn.Module, "load_state_dict", lambda self, _: state.update(self.state_dict()))
        context.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: None)
        inception_pytorch.fid_inception_v3()
    generator = torch.Generator().manual_seed(4)
    for key, value in state.items():
        if value.ndim > 1:  # He's gain, so that deep features still depend on the image
            state[key] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
    torch.save(state, folder / name)
    return folder / name


@pytest.mark.slow
def test_legacy_features_of_a_folder_equal_clean_fids(legacy_weights, folders, monkeypatch, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(Path(folders[0]).iterdir())[:5]:
        (few / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(legacy_weights.parent.parent))
    with warnings.catch_warnings(action="ignore"):
        model = build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
    theirs = clean_fid_features(str(few), model, "legacy_pytorch")
    extractor = load_extractor(
        "inception", fid_mode="legacy_pytorch", inception_path=str(legacy_weights.parent), with_probabilities=True
    )
    ours = torch.cat([extractor(image) for image in read(str(few))])
    assert np.std(theirs, axis=0).max() > 1e-2
    np.testing.assert_array_equal(ours.numpy(), theirs)
    features, probabilities = extractor.features_and_probabilities(read(str(few))[0])
    weight = torch.load(legacy_weights, weights_only=True)["fc.weight"]
    torch.testing.assert_close(probabilities, (features @ weight.T).softmax(dim=1))
    assert probabilities.shape == (1, 1008)


def test_the_two_modes_and_two_weights_are_told_apart(tiny_inception, legacy_weights, tmp_path):
    clean = load_extractor("inception", inception_path=str(tiny_inception))
    as_file = load_extractor("inception", inception_path=str(tiny_inception / "inception-2015-12-05.pt"))
    assert clean.protocol == as_file.protocol
    assert str(tiny_inception) not in json.dumps(clean.protocol)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(TinyInception()).save(tmp_path / "inception-2015-12-05.pt")
    other = load_extractor("inception", inception_path=str(tmp_path))
    legacy = load_extractor("inception", fid_mode="legacy_pytorch", inception_path=str(legacy_weights))
    identities = [extractor_identity(each.protocol) for each in (clean, other, legacy)]
    assert all(identities.count(identity) == 1 for identity in identities)


def test_loading_inception_leaves_warnings_as_they_were(tiny_inception, legacy_weights):
    before = list(warnings.filters)
    load_extractor("inception", inception_path=str(tiny_inception))
    load_extractor("inception", fid_mode="legacy_pytorch", inception_path=str(legacy_weights))
    assert warnings.filters == before


@pytest.mark.parametrize("fid_mode", ["clean", "legacy_pytorch"])
@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("Name or service not known"), TimeoutError("timed out"), b"half a file"]
)
def test_without_weights_the_two_ways_out_are_named(fid_mode, failure, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def urlopen(request):
        if isinstance(failure, Exception):
            raise failure
        response = io.BytesIO(failure)
        response.info = lambda: urllib.request.http.client.HTTPMessage()
        return response

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(ValueError) as error:
        load_extractor("inception", flag="--a_flag", fid_mode=fid_mode)
    name = {"clean": "inception-2015-12-05.pt", "legacy_pytorch": "pt_inception-2015-12-05-6726825d.pth"}[fid_mode]
    for words in ("--a_flag inception", "--inception_path FOLDER", "https://", name, "assets/classifier"):
        assert words in str(error.value)
    assert not list(tmp_path.rglob(f"*{name}*"))


def test_broken_or_foreign_inception_weights_are_refused(tiny_inception, legacy_weights, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--inception_path.*no inception-2015-12-05.pt there"):
        load_extractor("inception", inception_path=str(tmp_path))
    shutil.copy(tiny_inception / "inception-2015-12-05.pt", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="--inception_path.*no inception-2015-12-05.pt there"):
        load_extractor("inception", inception_path=str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="--inception_path.*no pt_inception"):
        load_extractor("inception", fid_mode="legacy_pytorch", inception_path=str(tiny_inception))
    with pytest.raises(ValueError, match="--fid_mode legacy.*clean and legacy_pytorch"):
        load_extractor("inception", fid_mode="legacy")

    # A half download of clean-fid, which leaves it where it looks for the whole.
    whole = (tiny_inception / "inception-2015-12-05.pt").read_bytes()
    (tmp_path / "inception-2015-12-05.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_extractor("inception", inception_path=str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="broken download.*Delete it"):
        load_extractor("inception")

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"fc.weight": Evil()}, tmp_path / legacy_weights.name)
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_extractor("inception", fid_mode="legacy_pytorch", inception_path=str(tmp_path))
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / legacy_weights.name)
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_extractor("inception", fid_mode="legacy_pytorch", inception_path=str(tmp_path))
    assert not (tmp_path / "ran").exists()

    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layers(images)

    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(Headless()).save(tmp_path / "inception-2015-12-05.pt")
    load_extractor("inception", inception_path=str(tmp_path))
    with pytest.raises(ValueError, match="no output layer"):
        InceptionExtractor("clean", str(tmp_path), with_probabilities=True)


# -------------------------------------------------------------------------------------------------- images and prompts

LETTERS = "abcde"  # a CLIP tokenizer without merges knows words of one letter


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    vocab = {
        token: i
        for i, token in enumerate(["<|startoftext|>", "<|endoftext|>"] + [f"{letter}</w>" for letter in LETTERS])
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": len(vocab), "max_position_embeddings": 7}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(5)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_processor(folder)
    return folder


PROMPTS = ["a b", "c", "a e d a c", "d d d", "e"]


def test_similarities_equal_the_models_own_logits(clip_folder, images):
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    assert len(set(map(tuple, tokens.input_ids.tolist()))) == 5
    with torch.no_grad():
        logits = model(pixel_values=normalise(images), **tokens).logits_per_image
    expected = logits / model.logit_scale.exp()
    assert expected.std() > 1e-3
    similarities = ClipScorer(str(clip_folder))(images, PROMPTS)
    assert similarities.shape == (5,) and similarities.dtype == torch.float32 and similarities.abs().max() <= 1
    torch.testing.assert_close(similarities, expected.diagonal(), rtol=1e-4, atol=1e-5)
    assert clip_score(similarities) == pytest.approx(expected.diagonal().clamp(min=0).mean().item(), abs=1e-5)


def test_similarities_do_not_depend_on_the_batch_and_long_prompts_are_cut(clip_folder, images):
    scorer = ClipScorer(str(clip_folder))
    together = scorer(images, PROMPTS)
    alone = torch.cat([scorer(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    long, cut = "a b d a c " * 9, "a b d a c"  # five words, start and end: seven tokens
    torch.testing.assert_close(scorer(images[:1], [long]), scorer(images[:1], [cut]), rtol=0, atol=0)
    gray = images[:1, :1]
    torch.testing.assert_close(scorer(gray, ["a"]), scorer(gray.repeat(1, 3, 1, 1), ["a"]), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="5 images, 1 prompts"):
        scorer(images, ["a b"])
    assert str(clip_folder) not in json.dumps(scorer.protocol) and scorer.protocol["max_prompt_tokens"] == 7


def test_what_is_no_whole_clip_is_refused(clip_folder, resnet_folder, tmp_path):
    with pytest.raises(ValueError, match="--clip_model.*ResNetModel.*both images and texts"):
        ClipScorer(str(resnet_folder))
    text_half = CLIPTextModel(CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    text_half.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="--clip_model.*CLIPTextModel.*both images and texts"):
        ClipScorer(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="--clip_model.*absent.*no directory"):
        ClipScorer(str(tmp_path / "absent"))

    model = CLIPModel.from_pretrained(clip_folder)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="--clip_model.*tokenizer"):
        ClipScorer(str(tmp_path / "bare"))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("text_model")}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match="--clip_model.*lack.*text_model"):
        ClipScorer(str(tmp_path / "part"))
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="--clip_model.*could not be loaded"):
        ClipScorer(str(tmp_path / "bare"))


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


@pytest.mark.slow
def test_bundled_splits_share_almost_no_image(bundled):
    train, test = ({np.asarray(image).tobytes() for image in rows["image"]} for rows in bundled.values())
    assert len(train) > 9_900 and len(test) > 9_900
    assert len(train & test) < 10


@pytest.mark.slow
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


@pytest.mark.slow
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
