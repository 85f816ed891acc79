# SPDX-License-Identifier: Apache-2.0
"""Images to features: clean-fid's Inception or any transformers image model.

Every extractor takes (B, 1 or 3, H, W) uint8 images of any size, does its own resizing, and says in `protocol` what
it is: two sets of features may be compared when `extractor_identity` of their protocols is equal.
"""

import functools
import threading

import torch
from torch import Tensor

from utils.command_line import UsageError, announce
from utils.metrics.inception import InceptionExtractor
from utils.metrics.transformers_models import check_weights, describe, from_pretrained, preprocess
from utils.pixels import as_rgb


def load_extractor(
    name: str,
    *,
    flag: str = "--feature_extractor",
    device: str | torch.device = "cpu",
    fid_mode: str = "clean",
    inception_path: str | None = None,
    with_probabilities: bool = False,
) -> "FeatureExtractor | InceptionExtractor":
    """`inception` with its `fid_mode` and `inception_path`, or a transformers model directory or Hub id.

    `with_probabilities` also gives it `features_and_probabilities`, for the Inception Score.
    Raises UsageError, naming the flag, when it cannot be had, is no image model, or has no classifier to ask.
    """
    if name == "inception":
        return InceptionExtractor(fid_mode, inception_path, device, flag=flag, with_probabilities=with_probabilities)
    return FeatureExtractor(name, device, flag=flag, with_probabilities=with_probabilities)


def extractor_identity(protocol: dict) -> dict:
    """The part of an extractor's protocol that decides its features: not its name, size, or library versions."""
    return {key: value for key, value in protocol.items() if key not in ("name", "dimensions", "libraries")}


class FeatureExtractor:
    """Penultimate features of any transformers image model, with the model's own preprocessing.

    The features are the model's `pooler_output` (for CLIP and its kind the image embedding), flattened. A model that
    pools nothing, or whose checkpoint holds no weights for its pooler (a ViT trained as a classifier), gives the mean
    of `last_hidden_state` over tokens or positions instead: a random pooler would be another metric in every run.

    Only safetensors weights are read, and no code from the Hub is run.
    """

    def __init__(
        self,
        name_or_path: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        flag: str = "--validation_feature_extractor",
        with_probabilities: bool = False,
    ) -> None:
        """Load a model directory or a Hub id. `dtype` is that of the forward pass; features are always float32.

        Raises UsageError, naming `flag`, when it cannot be loaded, is no RGB image model, or lacks the classifier head
        that `with_probabilities` needs.
        """
        # Here and not above: importing transformers takes seconds, which scripts that only read --help should not pay.
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

        announce(f"loading {name_or_path} ({flag})")
        self.name, self.flag = str(name_or_path), flag
        auto_class = AutoModelForImageClassification if with_probabilities else AutoModel
        needs = "config.json, model.safetensors and preprocessor_config.json"
        self.processor = from_pretrained(AutoImageProcessor, self.name, flag, "image model", needs)
        if with_probabilities:
            self._check_head()
        self.model, info = from_pretrained(auto_class, self.name, flag, "image model", needs, dtype=dtype)

        if self.model.main_input_name != "pixel_values" and not hasattr(self.model, "get_image_features"):
            raise UsageError(
                f"{flag}: {self.name!r} is a {type(self.model).__name__}, which takes no "
                "images. Pass an image model, such as a ResNet, ViT, DINOv2 or CLIP."
            )
        channels = getattr(self.model.config, "num_channels", 3)
        if channels != 3:
            raise UsageError(
                f"{flag}: {self.name!r} takes images of {channels} channels. Pass a model "
                "of RGB images; grayscale samples are repeated to three channels."
            )
        body = f"{self.model.base_model_prefix}." if with_probabilities else ""
        check_weights(self.model, info, self.name, flag, optional=f"{body}pooler.")
        self._trained_pooler = not info["missing_keys"]
        self.body = self.model.base_model if with_probabilities else self.model
        if with_probabilities and (self.body is self.model or not isinstance(self.body, PreTrainedModel)):
            raise UsageError(
                f"{flag}: {self.name!r} is a {type(self.model).__name__}, whose features and classes do not come from "
                "one forward pass. Pass another classifier, or leave the Inception Score out."
            )
        self.device, self.dtype = torch.device(device), dtype
        self.model.to(self.device).eval().requires_grad_(False)
        self._seen = threading.local()  # what the body gave in this thread's last forward of the whole model
        if with_probabilities:
            self.body.register_forward_hook(lambda module, inputs, output: setattr(self._seen, "output", output))
        self.dimensions = self._check_forward()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, D) float32 on `device`; one channel is repeated to three."""
        pixels = preprocess(self.processor, as_rgb(images), self.device, self.dtype)
        # A caller's autocast would change the features, and so the metric, with --mixed_precision.
        with torch.autocast(self.device.type, enabled=False):
            # CLIP and its kind pair an image with a text model; this is the image half.
            forward = getattr(self.body, "get_image_features", self.body)
            return self._pooled(forward(pixel_values=pixels))

    @torch.inference_mode()
    def features_and_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 or 3, H, W) uint8 -> (B, D) and (B, classes), both float32, in one forward pass."""
        assert self.body is not self.model, "load with with_probabilities=True"
        pixels = preprocess(self.processor, as_rgb(images), self.device, self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            logits = self.model(pixel_values=pixels).logits
        return self._pooled(self._seen.output), logits.float().softmax(dim=-1)

    def _pooled(self, outputs) -> Tensor:
        pooled = outputs.get("pooler_output") if self._trained_pooler else None
        self._pooling = "pooler_output" if pooled is not None else "mean of last_hidden_state"
        if pooled is None:
            hidden = outputs.last_hidden_state  # (B, tokens, D) of a transformer, (B, D, h, w) of a convolutional net
            pooled = hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
        return pooled.flatten(1).float()

    @functools.cached_property
    def protocol(self) -> dict:
        """What identifies the features."""
        described = describe(self.name, self.flag, self.processor, self.dtype)
        return {**described, "kind": f"transformers, {self._pooling}", "dimensions": self.dimensions}

    def _check_forward(self) -> int:
        """The number of features. Raises UsageError where two images of noise give none, or others a second time."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        size = getattr(config, "image_size", None) or 64  # any size will do, but for a model that neither resizes
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
        try:
            features, again = self(noise), self(noise)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise UsageError(
                f"{self.flag}: {self.name!r} is a {type(self.model).__name__}, which gives no features of an image "
                f"of {height}x{width}: {error}"
            ) from error
        if not torch.equal(features, again):
            raise UsageError(
                f"{self.flag}: {self.name!r} is a {type(self.model).__name__}, whose features of one image differ "
                "from call to call (as where patches are masked at random). Pass another image model."
            )
        return features.shape[1]

    def _check_head(self) -> None:
        """Raises UsageError when the checkpoint was not saved by an image classifier with a body of its own."""
        from transformers import AutoConfig

        architectures = from_pretrained(AutoConfig, self.name, self.flag, "image model", "config.json").architectures
        if not any(name.endswith("ForImageClassification") for name in architectures or []):
            raise UsageError(
                f"{self.flag}: {self.name!r} is a {' or '.join(architectures or ['model without architecture'])}: it "
                "has no classifier head, which the Inception Score needs. Pass an image classifier (its config.json "
                "names a ...ForImageClassification), or leave the Inception Score out."
            )
