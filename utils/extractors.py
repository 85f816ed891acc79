# SPDX-License-Identifier: Apache-2.0
"""Images to features: the penultimate layer of any image model, with the model's own preprocessing."""

from pathlib import Path

import torch
from torch import Tensor


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
    ) -> None:
        """Load a model directory or a Hub id. `dtype` is that of the forward pass; features are always float32.

        Raises ValueError, naming `flag`, when it cannot be loaded or is no RGB image model.
        """
        # Here and not above: importing transformers takes seconds, which scripts that only read --help should not pay.
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        name_or_path = str(name_or_path)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the report of unused classifier weights; what is missing is checked below
        try:
            self.processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
            self.model, info = AutoModel.from_pretrained(
                name_or_path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            kind = "a directory" if Path(name_or_path).is_dir() else "no directory here, so taken for a Hub id,"
            raise ValueError(
                f"{flag}: {name_or_path!r} is {kind} but could not be loaded as an image "
                "model. It needs config.json, model.safetensors and preprocessor_config.json, as save_pretrained of a "
                f"transformers model and of its image processor write them. The library says: {error}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)

        if self.model.main_input_name != "pixel_values" and not hasattr(self.model, "get_image_features"):
            raise ValueError(
                f"{flag}: {name_or_path!r} is a {type(self.model).__name__}, which takes no "
                "images. Pass an image model, such as a ResNet, ViT, DINOv2 or CLIP."
            )
        channels = getattr(self.model.config, "num_channels", 3)
        if channels != 3:
            raise ValueError(
                f"{flag}: {name_or_path!r} takes images of {channels} channels. Pass a model "
                "of RGB images; grayscale samples are repeated to three channels."
            )
        missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        if missing:
            raise ValueError(
                f"{flag}: the weights of {name_or_path!r} lack {len(missing)} tensors of "
                f"{type(self.model).__name__}, the first is {min(missing)}. Random weights would measure nothing."
            )
        self._trained_pooler = not info["missing_keys"]
        self.device, self.dtype = torch.device(device), dtype
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, D) float32 on `device`; one channel is repeated to three."""
        assert images.dtype == torch.uint8, f"images must be uint8 from 0 to 255, found {images.dtype}"
        assert images.ndim == 4 and images.shape[1] in (1, 3), f"(B, 1 or 3, H, W), found {tuple(images.shape)}"
        pixels = self._preprocess(images.expand(-1, 3, -1, -1))
        # A caller's autocast would change the features, and so the metric, with --mixed_precision.
        with torch.autocast(self.device.type, enabled=False):
            # CLIP and its kind pair an image with a text model; this is the image half.
            forward = getattr(self.model, "get_image_features", self.model)
            outputs = forward(pixel_values=pixels)
        pooled = outputs.get("pooler_output") if self._trained_pooler else None
        if pooled is None:
            hidden = outputs.last_hidden_state  # (B, tokens, D) of a transformer, (B, D, h, w) of a convolutional net
            pooled = hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
        return pooled.flatten(1).float()

    def _preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, h, w) in the model's size, range and dtype."""
        options = {"return_tensors": "pt"}
        on_device = self.processor.backend == "torchvision"  # the other kind goes through PIL, and so through the CPU
        images = images.to(self.device if on_device else "cpu")
        if on_device:
            options["disable_grouping"] = False  # one resize for the batch; on the CPU the default is a loop
        return self.processor(images, **options)["pixel_values"].to(self.device, self.dtype)
