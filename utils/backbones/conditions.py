# SPDX-License-Identifier: Apache-2.0
"""What a denoiser is told besides the time: nothing, a prompt, or a class (`labels.py`).

One of these is part of every backbone. A condition passes through four forms: rows of a dataset, tensors of a batch
(what a cache keeps), the denoiser's keywords, and for samples the stock pipeline's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.backbones.encoders import Frozen
from utils.commands import string
from utils.data.transforms import CaptionedTransform, ImageTransform, tokenize
from utils.randomness import StepRandom


class Nothing:
    """Unconditional: every method has the answer of a denoiser that is told nothing, and other conditions theirs."""

    tokenizers: Sequence = ()  # one for each `input_ids_<i>` of a batch
    share_dropped = 0.0  # of a batch, by `drop`
    components: Sequence[str] = ()  # folders of the teacher's pipeline whose weights decide what a cache holds
    absent: Sequence[str] = ()  # parts that the stock pipeline goes without, and loads only where it is told so

    def transform(self, *image_settings, **more_settings) -> ImageTransform:
        """A picklable row -> tensors of a batch; all settings as `ImageTransform` takes them."""
        return ImageTransform(*image_settings, **more_settings)

    def settings(self) -> dict[str, Any]:
        """Flags that decide what a cache holds, by name."""
        return {}

    def kept(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch what a cache keeps beside each image, (B, ...)."""
        return {}

    def embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings of a batch's prompts, (B, ...); a cache keeps one of each different prompt."""
        return {}

    def empty(self) -> dict[str, Tensor]:
        """What stands for no prompt, (1, ...), as `embed`."""
        return {}

    def use_empty(self, rows: dict[str, Tensor]) -> None:
        """Take `empty` from a cache, so that it need not be encoded."""

    def drop(self, rows: dict[str, Tensor], rng: StepRandom) -> dict[str, Any]:
        """The denoiser's keywords for rows of `kept` and `embed`. Some are emptied, for guidance: once here, so that
        teacher and student are told the same."""
        return {}

    def of_samples(self, dataset, first: int, count: int, num_rows: int | None = None) -> list:
        """What the samples `first` and on are of, over and over: of `num_rows` first rows of the data."""
        return [None] * count

    def described(self, conditions: Sequence) -> list[str]:
        """Those of `of_samples` in words, for people; empty where there is nothing to say."""
        return []

    def pipeline_arguments(self, conditions: Sequence) -> dict[str, Any]:
        """Those of the stock pipeline's call for as many samples."""
        return {"batch_size": len(conditions)}

    def call(self, condition: Any) -> dict[str, str]:
        """What a student's stock pipeline is told for one sample, to be shown: keyword -> Python's code of its
        value."""
        return {}

    def example(self) -> dict[str, Any]:
        """The denoiser's keywords for one sample, for the shapes of things."""
        return {}

    def free(self) -> None:
        """Encoders out of memory; they load again when they are needed again."""

    def forget(self) -> None:
        """What has been encoded, but for a cache's, as the encoders will run in another dtype."""


class Prompts(Nothing):
    """Text, by frozen encoders. A family says in `embed_tokens` and `keywords` what its denoiser reads of them."""

    micro_conditioning = False  # whether the denoiser is told the image's size and crop too
    zeros_when_empty = False  # whether no prompt is told as zeros, and not as the embeddings of ""

    def __init__(self, args, tokenizers: Sequence, encoders: Sequence[Frozen]):
        self.tokenizers, self.encoders = tokenizers, encoders
        self.components = [encoder.subfolder for encoder in encoders]
        self.caption_column = args.caption_column or "text"
        self.share_dropped = 0.1 if args.proportion_empty_prompts is None else args.proportion_empty_prompts
        self.given, self.num_rows = args.validation_prompts, args.validation_shown_samples
        self.known: dict[str, dict[str, Tensor]] = {}  # prompt -> its embeddings, on the CPU
        self.known_empty: dict[str, Tensor] | None = None  # (1, ...), on the device that it was last asked for
        self.cached_empty: dict[str, Tensor] | None = None

    def embed_tokens(self, input_ids: list[Tensor]) -> dict[str, Tensor]:
        """Tokens (B, T), a tensor for each tokenizer, -> embeddings by name, (B, ...)."""
        raise NotImplementedError

    def keywords(self, text: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Any]:
        """The denoiser's keywords for embeddings `text`; `rows` hold what `kept` kept."""
        raise NotImplementedError

    def transform(self, *image_settings, **more_settings) -> CaptionedTransform:
        """Pixels, tokens, and with `micro_conditioning` time ids."""
        return CaptionedTransform(
            *image_settings,
            caption_column=self.caption_column,
            tokenizers=self.tokenizers,
            micro_conditioning=self.micro_conditioning,
            **more_settings,
        )

    def settings(self) -> dict[str, Any]:
        """The column that the prompts are in, and what stands for no prompt where that is not the embeddings of ""."""
        return {"caption_column": self.caption_column} | ({"empty_prompt": "zeros"} if self.zeros_when_empty else {})

    def embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From `input_ids_0`, `input_ids_1` ... (B, T)."""
        return self._encoded([batch[f"input_ids_{i}"] for i in range(len(self.tokenizers))])

    @torch.no_grad()
    def _encoded(self, input_ids: list[Tensor]) -> dict[str, Tensor]:
        device = self.encoders[0].place()[0]
        with torch.autocast(device.type, enabled=False):
            return self.embed_tokens([ids.to(device) for ids in input_ids])

    def prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As `embed`, from strings; every prompt is encoded once, alone: in a batch its last bits would be others."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.known:
                tokens = [tokenize(tokenizer, [prompt]) for tokenizer in self.tokenizers]
                self.known[prompt] = {name: value[0].cpu() for name, value in self._encoded(tokens).items()}
        found, device = [self.known[prompt] for prompt in prompts], self.encoders[0].place()[0]
        return {name: torch.stack([each[name] for each in found]).to(device) for name in found[0]}

    def empty(self) -> dict[str, Tensor]:
        """What the stock pipeline tells the denoiser where there is no prompt: the embeddings of "", or zeros."""
        if self.known_empty is None:
            self.known_empty = self.prompts([""])
            if self.zeros_when_empty:
                self.known_empty = {name: torch.zeros_like(value) for name, value in self.known_empty.items()}
        device = self.encoders[0].place()[0]
        self.known_empty = {name: value.to(device) for name, value in self.known_empty.items()}  # a cache's moves once
        return self.known_empty

    def use_empty(self, rows: dict[str, Tensor]) -> None:
        """As they were encoded for the cache."""
        self.known_empty = self.cached_empty = rows

    def drop(self, rows: dict[str, Tensor], rng: StepRandom) -> dict[str, Any]:
        """A share of the prompts, `--proportion_empty_prompts`, becomes the empty one."""
        empty = self.empty()
        dropped = rng.uniform((len(rows[next(iter(empty))]),)) < self.share_dropped
        text = {
            name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), value, rows[name])
            for name, value in empty.items()
        }
        return self.keywords(text, rows)

    def of_samples(self, dataset, first: int, count: int, num_rows: int | None = None) -> list[str]:
        """`--validation_prompts`, else captions of the data's first rows, as many as a grid has samples."""
        prompts = self.given or dataset.captions(num_rows or self.num_rows or count)
        return [prompts[i % len(prompts)] for i in range(first, first + count)]

    def described(self, conditions: Sequence[str]) -> list[str]:
        """The prompts."""
        return list(conditions)

    def call(self, condition: str) -> dict[str, str]:
        """The prompt."""
        return {"prompt": string(condition)}

    def free(self) -> None:
        """The text encoders."""
        for encoder in self.encoders:
            encoder.free()

    def forget(self) -> None:
        """Embeddings of prompts, and of none."""
        self.known, self.known_empty = {}, self.cached_empty
