# SPDX-License-Identifier: Apache-2.0
"""What make_text_teacher.py, make_dit_teacher.py and make_flow_teacher.py share: small latent teachers on one core.

All three learn the bundled images as 16x16 latents of four channels, of one small AutoencoderKL. It has a single stage
and makes nothing smaller: what it is for is that everything downstream is that of a latent model, with as many places
in a channel as fill 16 groups of 16. A teacher is told its class by its number, or by its name in words. Training is
plain PyTorch on stock diffusers, with noise that is a function of (seed, step): a run that was killed goes on with the
same command. Measured is the share of samples that assets/classifier takes for what was asked, and their Frechet
distance to the 10,000 test images.
"""

import argparse
import shutil
import string
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from latent_flags import BATCH, ROOT, SEED, VAE_BATCH
from torch import Tensor, nn
from torchvision.utils import save_image
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from utils.files import written_beside
from utils.metrics.distances import frechet_distance
from utils.metrics.extractors import load_extractor
from utils.metrics.statistics import FeatureStatistics
from utils.pixels import as_rgb
from utils.randomness import seed_from

DATA, CLASSIFIER = ROOT / "assets" / "fashion_mnist_16", ROOT / "assets" / "classifier"
NOUNS = ["a t-shirt", "trousers", "a pullover", "a dress", "a coat"]
NOUNS += ["a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot"]  # in the order of the labels
SIDE, CHANNELS = 16, 4  # of the latents
# Of the KL per latent element, beside the L1 error per pixel in [-1, 1]: at 3e-3 half of a channel is noise, at 1e-4
# the four channels are nearly one (correlations of .96)
KL_WEIGHT = 1e-3
DROPPED = 0.1  # share of the images that is told no class, as classifier-free guidance needs
SAVING_STEPS = 200


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 16, 16) uint8 and labels (N,) of "train" or "test"."""
    rows = datasets.load_dataset(str(DATA), split=split)
    images = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]]))[:, None]
    return as_rgb(images), torch.tensor(rows["label"])


def make_captioned(folder: Path) -> None:
    """Both splits of the bundled images with a column `text`, the class in words, in `folder`, unless they are
    there."""
    for split in ("train", "test"):
        target = folder / "data" / f"{split}-00000-of-00001.parquet"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            rows = datasets.load_dataset(str(DATA), split=split)
            with written_beside(target) as beside:
                rows.add_column("text", [NOUNS[label] for label in rows["label"]]).to_parquet(beside)


def train_vae(folder: Path, steps: int) -> AutoencoderKL:
    """The AutoencoderKL in `folder`; trained where there is none, and saved with its scaling_factor."""
    if (folder / "config.json").is_file():
        return AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        block_out_channels=[16],  # one stage: as many latents a side as pixels
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    images, _ = load_split("train")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=steps)
    start = time.process_time()
    for step in range(1, steps + 1):
        pixels = images[torch.randint(len(images), (VAE_BATCH,))].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        error = F.l1_loss(vae.decode(posterior.sample()).sample, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error + KL_WEIGHT * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if step % 100 == 0 or step == steps:
            spent = time.process_time() - start
            print(f"VAE, step {step}: L1 {error:.4f}, KL {kl:.3f}, {spent:.0f} CPU s", flush=True)
    vae.eval().requires_grad_(False)
    mean, std = encode(vae, images)
    deviation = (mean + std * torch.randn_like(std)).std(dim=(0, 2, 3))
    vae.register_to_config(scaling_factor=1 / deviation.square().mean().sqrt().item())
    print(f"latents: deviation by channel {deviation.tolist()}, of it noise {std.mean(dim=(0, 2, 3)).tolist()}")
    save_whole(vae, folder)
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and std of uint8 images, both (N, 4, 16, 16), not scaled."""
    posteriors = [vae.encode(batch.float() / 127.5 - 1).latent_dist for batch in images.split(250)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def make_tokenizer() -> CLIPTokenizer:
    """Every word of the captions one token, any other text letter by letter.

    A word is merged from its end: every merge takes one letter to a piece with "</w>", so no two words get in each
    other's way, whatever the order. (The library's own training gives other ids in every run.)
    """
    words = sorted(set(" ".join(NOUNS).replace("-", " - ").split()))
    merges = [(word[i], word[i + 1 :] + "</w>") for word in words for i in reversed(range(len(word) - 1))]
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=8)


def make_text_encoder(kind: type[PreTrainedModel], width: int, tokenizer: CLIPTokenizer) -> PreTrainedModel:
    """A two-layer CLIP of random frozen weights, enough to tell the captions apart."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    encoder = kind(config).eval().requires_grad_(False)
    nn.init.normal_(encoder.get_input_embeddings().weight)  # at CLIP's 0.02, untrained layers drown words
    return encoder


def save_whole(part: DiffusionPipeline | nn.Module, folder: Path) -> None:
    """Write beside `folder` and rename, so that a killed run leaves no half of it."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    part.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def train(
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    batch_loss: Callable,
    folder: Path,
    *,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Train `denoiser` on the latents, encoded once; its EMA is saved in the pipeline in `folder` at the end.

    `batch_loss(clean, labels, generator)` gives the loss of latents (B, 4, 16, 16) and labels (B,), 10 for none. What
    a killed run goes on from is kept beside `folder`.
    """
    images, labels = load_split("train")
    mean, std = (x * pipeline.vae.config.scaling_factor for x in encode(pipeline.vae, images))
    denoiser.train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=rate, weight_decay=1e-2)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=steps)
    ema = EMAModel(denoiser.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)
    parts = {"denoiser": denoiser, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "ema": ema}
    state, done, spent, total = folder.with_name(folder.name + ".state"), 0, 0.0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, spent = saved["step"], saved["cpu_seconds"]
        print(f"going on from step {done}, after {spent:.0f} CPU s", flush=True)
    start = time.process_time() - spent
    for step in range(done + 1, steps + 1):
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        rows = torch.randint(len(mean), (BATCH,), generator=generator)
        clean = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        told = labels[rows].masked_fill(torch.rand(BATCH, generator=generator) < DROPPED, len(NOUNS))
        loss = batch_loss(clean, told, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(denoiser.parameters())
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}: mean loss {total / 50:.4f}, {time.process_time() - start:.0f} CPU s", flush=True)
            total = 0.0
        if step % SAVING_STEPS == 0 or step == steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            with written_beside(state) as beside:
                torch.save(states | {"step": step, "cpu_seconds": time.process_time() - start}, beside)
    ema.copy_to(denoiser.parameters())
    save_whole(pipeline, folder)
    state.unlink(missing_ok=True)
    print(f"{folder}: {sum(p.numel() for p in denoiser.parameters()):,} parameters, {steps} steps", flush=True)


class Judge:
    """assets/classifier, and what it finds in the test images."""

    def __init__(self):
        self.extractor = load_extractor(str(CLASSIFIER), with_probabilities=True)
        self.real, self.test = FeatureStatistics(), load_split("test")
        for images in self.test[0].split(500):
            self.real.update(self.extractor(images))

    def __call__(self, images: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """The Frechet distance of (N, 3, H, W) uint8 images, and whether each was taken for its `wanted` class."""
        own, right = FeatureStatistics(), []
        for part, labels in zip(images.split(500), wanted.split(500), strict=True):
            features, probabilities = self.extractor.features_and_probabilities(part)
            own.update(features)
            right.append(probabilities.argmax(1).cpu() == labels)
        return frechet_distance(self.real.mean, self.real.cov, own.mean, own.cov), torch.cat(right)


def measure(draw: Callable, vae: AutoencoderKL, samples: int, grid: Path) -> dict:
    """Numbers of `samples` samples, all classes in turn, and of as many test images through the VAE; ten a class go
    to `grid`. `draw(labels, generators)` gives images (B, 3, 16, 16) in [0, 1]."""
    judge, start = Judge(), time.process_time()
    wanted = torch.arange(samples) % len(NOUNS)
    generators = [torch.Generator().manual_seed(seed_from(SEED, 1, i)) for i in range(samples)]
    parts = []
    for first in range(0, samples, 100):
        images = draw(wanted[first : first + 100].tolist(), generators[first : first + 100])
        parts.append((images * 255).round().clamp(0, 255).to(torch.uint8))
        print(f"{first + len(images)} of {samples} samples, {time.process_time() - start:.0f} CPU s", flush=True)
    seconds, images = time.process_time() - start, torch.cat(parts)
    distance, right = judge(images, wanted)
    rows = [images[wanted == label][:10] for label in range(len(NOUNS))]
    save_image(torch.cat(rows).float() / 255, grid, nrow=10, padding=1)

    test, labels = (part[:samples] for part in judge.test)
    mean, _ = encode(vae, test)
    with torch.inference_mode():
        decoded = torch.cat([vae.decode(part).sample for part in mean.split(250)])
    decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    plain, through = judge(test, labels), judge(decoded, labels)
    shares = {noun: right[wanted == i].double().mean().item() for i, noun in enumerate(NOUNS)}
    return {
        "samples": samples,
        "as_asked": right.double().mean().item(),
        "as_asked_by_class": shares,
        "frechet_distance": distance,
        "test_images": {"frechet_distance": plain[0], "as_asked": plain[1].double().mean().item()},
        "through_the_vae": {"frechet_distance": through[0], "as_asked": through[1].double().mean().item()},
        "vae_error_of_255": (decoded.float() - test.float()).abs().mean().item(),
        "sampling_cpu_seconds": round(seconds, 1),
    }


def run_script(args: argparse.Namespace, make: Callable) -> None:
    """Train the teacher that the command line (latent_flags.py) names, or measure it.

    `make(vae)` gives (untrained pipeline, its denoiser, batch_loss); `make.load(folder)` the trained pipeline, ready
    to be called; `make.condition(labels)` the keywords of that call.
    """
    torch.set_num_threads(1)
    name, target = args.target.name, args.target
    if not args.measure:
        args.folder.mkdir(parents=True, exist_ok=True)
        make_captioned(args.folder / "data")
        if args.init_from and not (args.folder / "vae").exists():
            vae = AutoencoderKL.from_pretrained(args.init_from, subfolder="vae", use_safetensors=True)
            save_whole(vae, args.folder / "vae")
        pipeline, denoiser, batch_loss = make(train_vae(args.folder / "vae", args.vae_steps))
        if args.init_from:
            part = next(part for part, module in pipeline.components.items() if module is denoiser)
            trained = type(denoiser).from_pretrained(args.init_from, subfolder=part, use_safetensors=True)
            denoiser.load_state_dict(trained.state_dict())
        print(f"{name}: {sum(p.numel() for p in denoiser.parameters()):,} parameters", flush=True)
        options = {"steps": args.steps, "rate": args.learning_rate, "seed": args.seed}
        train(pipeline, denoiser, batch_loss, target, **options)
        return
    from study_jobs import Results

    pipeline = make.load(target)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": args.inference_steps, "guidance_scale": args.guidance}

    @torch.no_grad()
    def draw(labels: list[int], generators: list[torch.Generator]) -> Tensor:
        images = pipeline(generator=generators, output_type="np", **make.condition(labels), **options).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    numbers = measure(draw, pipeline.vae, args.samples, args.folder / f"{name}.png")
    print("\n".join(f"{key}: {value}" for key, value in numbers.items()))
    Results("latent_teachers", "teacher").add({"teacher": name, **options, **numbers})
