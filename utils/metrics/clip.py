# SPDX-License-Identifier: Apache-2.0
"""How well images fit their prompts, by any CLIP of transformers."""

import threading

import torch
from torch import Tensor

from utils.command_line import UsageError
from utils.metrics.transformers_models import check_weights, describe, from_pretrained, preprocess
from utils.pixels import as_rgb


class ClipScorer:
    """Cosine similarity of images and prompts under any transformers CLIP, for the CLIP score."""

    def __init__(self, name_or_path: str, *, flag: str = "--clip_model", device: str | torch.device = "cpu") -> None:
        """Load a model directory or a Hub id; only safetensors, no code from the Hub.

        Raises UsageError, naming `flag`, when it cannot be loaded or has no text half beside its image half.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        name = str(name_or_path)
        needs = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"
        self.model, info = from_pretrained(AutoModel, name, flag, "CLIP model", needs, dtype=torch.float32)
        if not (hasattr(self.model, "get_text_features") and hasattr(self.model, "get_image_features")):
            raise UsageError(
                f"{flag}: {name!r} is a {type(self.model).__name__}, which does not embed both images and texts. Pass "
                "a whole CLIP, such as openai/clip-vit-large-patch14; a text or vision half alone is not enough."
            )
        check_weights(self.model, info, name, flag)
        self.processor = from_pretrained(AutoImageProcessor, name, flag, "CLIP model", needs)
        self.tokenizer = from_pretrained(AutoTokenizer, name, flag, "CLIP model", needs)
        self._tokenizing = threading.Lock()  # a fast tokenizer changes its own settings in a call
        longest = self.model.config.text_config.max_position_embeddings
        self.max_length = min(longest, self.tokenizer.model_max_length)
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.protocol = {
            **describe(name, flag, self.processor, torch.float32),
            "kind": "transformers, CLIP",
            "max_prompt_tokens": self.max_length,
        }

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, 1 or 3, H, W) uint8 and B prompts -> (B,) float32 in -1 ... 1; long prompts are cut to the model's."""
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        pixels = preprocess(self.processor, as_rgb(images), self.device, torch.float32)
        with self._tokenizing:
            tokens = self.tokenizer(
                list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            image = self.model.get_image_features(pixel_values=pixels).pooler_output
            text = self.model.get_text_features(**tokens).pooler_output
        return torch.nn.functional.cosine_similarity(image, text, dim=-1)
