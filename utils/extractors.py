# SPDX-License-Identifier: Apache-2.0
"""Images to features: clean-fid's Inception or any transformers image model, and CLIP for images with prompts.

Every extractor takes (B, 1 or 3, H, W) uint8 images of any size, does its own resizing, and says in `protocol` what
it is: two sets of features may be compared when `extractor_identity` of their protocols is equal.
"""

import functools
import json
import threading
from pathlib import Path

import torch
from torch import Tensor

from utils.inception import InceptionExtractor, as_rgb, sha256, versions


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
    Raises ValueError, naming the flag, when it cannot be had, is no image model, or has no classifier to ask.
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

        Raises ValueError, naming `flag`, when it cannot be loaded, is no RGB image model, or lacks the classifier head
        that `with_probabilities` needs.
        """
        # Here and not above: importing transformers takes seconds, which scripts that only read --help should not pay.
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

        self.name, self.flag = str(name_or_path), flag
        auto_class = AutoModelForImageClassification if with_probabilities else AutoModel
        needs = "config.json, model.safetensors and preprocessor_config.json"
        self.processor = _from_pretrained(AutoImageProcessor, self.name, flag, "image model", needs)
        if with_probabilities:
            self._check_head()
        self.model, info = _from_pretrained(auto_class, self.name, flag, "image model", needs, dtype=dtype)

        if self.model.main_input_name != "pixel_values" and not hasattr(self.model, "get_image_features"):
            raise ValueError(
                f"{flag}: {self.name!r} is a {type(self.model).__name__}, which takes no "
                "images. Pass an image model, such as a ResNet, ViT, DINOv2 or CLIP."
            )
        channels = getattr(self.model.config, "num_channels", 3)
        if channels != 3:
            raise ValueError(
                f"{flag}: {self.name!r} takes images of {channels} channels. Pass a model "
                "of RGB images; grayscale samples are repeated to three channels."
            )
        body = f"{self.model.base_model_prefix}." if with_probabilities else ""
        _check_weights(self.model, info, self.name, flag, optional=f"{body}pooler.")
        self._trained_pooler = not info["missing_keys"]
        self.body = self.model.base_model if with_probabilities else self.model
        if with_probabilities and (self.body is self.model or not isinstance(self.body, PreTrainedModel)):
            raise ValueError(
                f"{flag}: {self.name!r} is a {type(self.model).__name__}, whose features and classes do not come from "
                "one forward pass. Pass another classifier, or leave the Inception Score out."
            )
        self.device, self.dtype = torch.device(device), dtype
        self.model.to(self.device).eval().requires_grad_(False)
        self._seen = threading.local()  # what the body gave in this thread's last forward of the whole model
        if with_probabilities:
            self.body.register_forward_hook(lambda module, inputs, output: setattr(self._seen, "output", output))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, D) float32 on `device`; one channel is repeated to three."""
        pixels = _preprocess(self.processor, as_rgb(images), self.device, self.dtype)
        # A caller's autocast would change the features, and so the metric, with --mixed_precision.
        with torch.autocast(self.device.type, enabled=False):
            # CLIP and its kind pair an image with a text model; this is the image half.
            forward = getattr(self.body, "get_image_features", self.body)
            return self._pooled(forward(pixel_values=pixels))

    @torch.inference_mode()
    def features_and_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 or 3, H, W) uint8 -> (B, D) and (B, classes), both float32, in one forward pass."""
        assert self.body is not self.model, "load with with_probabilities=True"
        pixels = _preprocess(self.processor, as_rgb(images), self.device, self.dtype)
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
        """What identifies the features. Runs the model on a blank image, which tells their number and kind."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        size = getattr(config, "image_size", None) or 64  # any size will do, but for a model that neither resizes
        height, width = (size, size) if isinstance(size, int) else size
        dimensions = self(torch.zeros(1, 3, height, width, dtype=torch.uint8)).shape[1]
        described = _describe(self.name, self.flag, self.processor, self.dtype)
        return {**described, "kind": f"transformers, {self._pooling}", "dimensions": dimensions}

    def _check_head(self) -> None:
        """Raises ValueError when the checkpoint was not saved by an image classifier with a body of its own."""
        from transformers import AutoConfig

        architectures = _from_pretrained(AutoConfig, self.name, self.flag, "image model", "config.json").architectures
        if not any(name.endswith("ForImageClassification") for name in architectures or []):
            raise ValueError(
                f"{self.flag}: {self.name!r} is a {' or '.join(architectures or ['model without architecture'])}: it "
                "has no classifier head, which the Inception Score needs. Pass an image classifier (its config.json "
                "names a ...ForImageClassification), or leave the Inception Score out."
            )


class ClipScorer:
    """Cosine similarity of images and prompts under any transformers CLIP, for the CLIP score."""

    def __init__(self, name_or_path: str, *, flag: str = "--clip_model", device: str | torch.device = "cpu") -> None:
        """Load a model directory or a Hub id; only safetensors, no code from the Hub.

        Raises ValueError, naming `flag`, when it cannot be loaded or has no text half beside its image half.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        name = str(name_or_path)
        needs = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"
        self.model, info = _from_pretrained(AutoModel, name, flag, "CLIP model", needs, dtype=torch.float32)
        if not (hasattr(self.model, "get_text_features") and hasattr(self.model, "get_image_features")):
            raise ValueError(
                f"{flag}: {name!r} is a {type(self.model).__name__}, which does not embed both images and texts. Pass "
                "a whole CLIP, such as openai/clip-vit-large-patch14; a text or vision half alone is not enough."
            )
        _check_weights(self.model, info, name, flag)
        self.processor = _from_pretrained(AutoImageProcessor, name, flag, "CLIP model", needs)
        self.tokenizer = _from_pretrained(AutoTokenizer, name, flag, "CLIP model", needs)
        self._tokenizing = threading.Lock()  # a fast tokenizer changes its own settings in a call
        longest = self.model.config.text_config.max_position_embeddings
        self.max_length = min(longest, self.tokenizer.model_max_length)
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.protocol = {
            **_describe(name, flag, self.processor, torch.float32),
            "kind": "transformers, CLIP",
            "max_prompt_tokens": self.max_length,
        }

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 1 or 3, H, W) uint8 and B prompts -> (B,) float32 in -1 ... 1; long prompts are cut to the model's."""
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        pixels = _preprocess(self.processor, as_rgb(images), self.device, torch.float32)
        with self._tokenizing:
            tokens = self.tokenizer(
                list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            image = self.model.get_image_features(pixel_values=pixels).pooler_output
            text = self.model.get_text_features(**tokens).pooler_output
        return torch.nn.functional.cosine_similarity(image, text, dim=-1)


def _preprocess(processor, images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, h, w) in the model's size, range and dtype."""
    options = {"return_tensors": "pt"}
    on_device = processor.backend == "torchvision"  # the other kind goes through PIL, and so through the CPU
    images = images.to(device if on_device else "cpu")
    if on_device:
        options["disable_grouping"] = False  # one resize for the batch; on the CPU the default is a loop
    return processor(images, **options)["pixel_values"].to(device, dtype)


def _from_pretrained(auto_class, name: str, flag: str, what: str, needs: str, dtype: torch.dtype | None = None):
    """`auto_class.from_pretrained(name)`; with `dtype` a model and its loading report. Raises ValueError."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    options = {} if dtype is None else {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of unused weights; what is missing is checked by the callers
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        kind = "a directory" if Path(name).is_dir() else "no directory here, so taken for a Hub id,"
        raise ValueError(
            f"{flag}: {name!r} is {kind} but could not be loaded as {'an' if what[0] in 'aeiou' else 'a'} {what}. It "
            f"needs {needs}, as save_pretrained of a transformers model and of its processor write them. The library "
            f"says: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _check_weights(model, info: dict, name: str, flag: str, optional: str = "pooler.") -> None:
    """Raises ValueError when tensors are missing from the checkpoint, other than those that start with `optional`."""
    missing = {key for key in info["missing_keys"] if not key.startswith(optional)}
    if missing:
        raise ValueError(
            f"{flag}: the weights of {name!r} lack {len(missing)} tensors of "
            f"{type(model).__name__}, the first is {min(missing)}. Random weights would measure nothing."
        )


def _describe(name: str, flag: str, processor, dtype: torch.dtype) -> dict:
    """The protocol of a transformers model: hashes of the files it was read from, and its preprocessing."""
    from transformers.utils import cached_file

    folder = Path(name)
    if not folder.is_dir():  # a Hub id, just loaded
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
    whole = folder / "model.safetensors"
    weights = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not weights:
        raise ValueError(f"{flag}: {name!r} has no model.safetensors on its main branch, to identify it by.")
    preprocessing = json.loads(processor.to_json_string())
    size = "x".join(str(value) for value in preprocessing["size"].values()) if preprocessing.get("do_resize") else "no"
    return {
        "name": folder.resolve().name if Path(name).is_dir() else name,
        "resize": f"{size} resize, {processor.backend}",
        "preprocessing": {**preprocessing, "backend": processor.backend},
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": {path.name: sha256(path) for path in [folder / "config.json", *weights]},
        "libraries": versions("transformers", "torchvision", "pillow", "torch"),
    }
