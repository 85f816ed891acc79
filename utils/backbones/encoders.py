# SPDX-License-Identifier: Apache-2.0
"""VAE and text encoders of a latent teacher: frozen, loaded when first needed, freed when they are in the way."""

import functools
import gc

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from utils.command_line import UsageError
from utils.data.transforms import tokenize

TEACHER = "pretrained_model_name_or_path"


class Encoders:
    """Images to latents and prompts to embeddings, on the device and in the dtype that `place` was given."""

    def __init__(self, args, *, tokenizers: list, xl: bool):
        self.args, self.tokenizers, self.xl = args, tokenizers, xl
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.known: dict[str, dict[str, torch.Tensor]] = {}  # prompt -> its embeddings, on the CPU

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where the encoders run when they are loaded next."""
        self.device, self.dtype = device, dtype

    @functools.cached_property
    def vae(self) -> AutoencoderKL:
        """Of `--pretrained_vae_model_name_or_path`, else the teacher's; SDXL's own stays in float32, as it overflows.

        Raises UsageError naming the flag where it cannot be loaded."""
        other = self.args.pretrained_vae_model_name_or_path
        dtype = torch.float32 if self.xl and not other else self.dtype
        if other:
            return self._loaded(AutoencoderKL, "pretrained_vae_model_name_or_path", dtype=dtype)
        return self._loaded(AutoencoderKL, TEACHER, subfolder="vae", dtype=dtype)

    @functools.cached_property
    def text_encoders(self) -> list[CLIPTextModel]:
        """One, or SDXL's two.

        Raises UsageError naming the flag where they cannot be loaded."""
        kinds = {"text_encoder": CLIPTextModel}
        if self.xl:
            kinds["text_encoder_2"] = CLIPTextModelWithProjection
        return [self._loaded(kind, TEACHER, subfolder=name, dtype=self.dtype) for name, kind in kinds.items()]

    def _loaded(self, kind: type, argument: str, **options):
        source = getattr(self.args, argument)
        if argument == TEACHER:
            options |= {"revision": self.args.revision, "variant": self.args.variant}
        try:
            model = kind.from_pretrained(
                source, use_safetensors=None if self.args.allow_pickle_weights else True, **options
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"--{argument} {source}: its {kind.__name__} does not load: {error}") from error
        return model.to(self.device).eval().requires_grad_(False)

    def free(self) -> None:
        """Forget the models; they load again when they are needed again."""
        for name in ("vae", "text_encoders"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def posterior(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float pixels in [-1, 1] (B, 3, H, W) -> `latent_mean` and `latent_std` (B, C, h, w), not yet scaled."""
        vae = self.vae
        with torch.autocast(self.device.type, enabled=False):
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return {"latent_mean": posterior.mean.to(self.dtype), "latent_std": posterior.std.to(self.dtype)}

    @torch.no_grad()
    def text(self, input_ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens (B, T), a tensor for each tokenizer, -> `prompt_embeds` (B, T, D) and, for SDXL, `pooled` (B, P)."""
        with torch.autocast(self.device.type, enabled=False):
            outputs = [
                encoder(ids.to(self.device), output_hidden_states=self.xl)
                for encoder, ids in zip(self.text_encoders, input_ids, strict=True)
            ]
        if not self.xl:
            return {"prompt_embeds": outputs[0][0]}
        # SDXL reads the layer before the last of both, and the second encoder's pooled projection (Podell et al. 2023)
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": embeds, "pooled": outputs[-1][0]}

    def prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """As `text`, from strings; every prompt is encoded once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.known:
                tokens = [tokenize(tokenizer, [prompt]) for tokenizer in self.tokenizers]
                self.known[prompt] = {name: value[0].cpu() for name, value in self.text(tokens).items()}
        found = [self.known[prompt] for prompt in prompts]
        return {name: torch.stack([each[name] for each in found]).to(self.device) for name in found[0]}
