# SPDX-License-Identifier: Apache-2.0
"""Train a small text-to-image latent diffusion model on Fashion-MNIST: a teacher for studies on a CPU.

    # Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere: --source, a folder with the four .gz files.
    export OMP_NUM_THREADS=1
    python benchmarks/make_text_teacher.py dataset data                      # 60,000 + 10,000 captioned images
    python benchmarks/make_text_teacher.py vae vae --data data               # AutoencoderKL, 32x32 -> 4x8x8
    python benchmarks/make_text_teacher.py teacher teacher --data data --vae vae
    python benchmarks/make_text_teacher.py measure teacher --data data --grid grid.png

`teacher` writes a complete stock pipeline: StableDiffusionPipeline.from_pretrained("teacher")("a sneaker"). Its U-Net
has the layout of Stable Diffusion's with three stages instead of four, so what prunes one prunes the other; its text
encoder is a two-layer CLIP of random frozen weights, enough to tell the captions apart. text_student.json, beside
this file, is the config of a small U-Net for the same latents and embeddings.
"""

import argparse
import shutil
import string
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image as PILImage
from torch import Tensor
from torchvision.utils import save_image
from transformers import AutoModelForImageClassification, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.make_assets import DEBIAN_FOLDER, LABELS, MIT_LICENSE, read_idx  # noqa: E402
from utils.metrics.distances import frechet_distance  # noqa: E402
from utils.metrics.extractors import FeatureExtractor  # noqa: E402
from utils.metrics.statistics import FeatureStatistics  # noqa: E402

NOUNS = ["a t-shirt", "trousers", "a pullover", "a dress", "a coat"]
NOUNS += ["a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot"]  # in the order of LABELS
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "{} on a black background")
CAPTIONS = [template.format(noun) for noun in NOUNS for template in TEMPLATES]
CLASSIFIER = str(ROOT / "assets" / "classifier")
EMPTY_PROMPTS = 0.1  # share of captions replaced by "" in training, as classifier-free guidance needs
KL_WEIGHT = 1e-5  # of the KL per latent element, beside the L1 error per pixel in [-1, 1]; 1e-3 emptied a channel
VAE_BATCH, BATCH = 32, 64  # images a step
SEED = 0


def make_dataset(source: Path, folder: Path) -> None:
    """Write both splits as parquet with columns image, text and label, and the licence to `folder`.

    All images in the original order, 28x28 padded to 32x32 with black, the gray repeated to RGB; `text` is the class
    in words, in a template drawn by row.
    """
    features = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        gray = np.pad(read_idx(source / f"{prefix}-images-idx3-ubyte.gz"), ((0, 0), (2, 2), (2, 2)))
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
        templates = np.random.default_rng(SEED).integers(len(TEMPLATES), size=len(labels))
        rows = {
            "image": [PILImage.fromarray(image).convert("RGB") for image in gray],
            "text": [TEMPLATES[i].format(NOUNS[label]) for i, label in zip(templates, labels, strict=True)],
            "label": labels,
        }
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(path)
        print(f"{path}: {len(labels):,} images, {path.stat().st_size:,} bytes")
    (folder / "LICENSE").write_text(MIT_LICENSE, encoding="utf-8")


def load_split(data: Path, split: str) -> tuple[Tensor, list[str], Tensor]:
    """Images (N, 3, 32, 32) uint8, captions and labels (N,) of "train" or "test"."""
    if not (data / "data").is_dir():
        raise ValueError(f"--data: {data} holds no folder data/. Write one with the command `dataset`.")
    rows = load_dataset(str(data), split=split)
    images = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), list(rows["text"]), torch.tensor(rows["label"])


def make_vae(data: Path, folder: Path, steps: int) -> None:
    """Train the AutoencoderKL, measure its latents and its error, and save it with its scaling_factor."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 16, 32),  # three stages: each side divided by four
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters")
    images, _, _ = load_split(data, "train")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        pixels = images[torch.randint(len(images), (VAE_BATCH,))].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        error = F.l1_loss(vae.decode(posterior.sample()).sample, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: L1 {error:.4f}, KL {kl:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    vae.eval()
    mean, std = encode_images(vae, images[:10_000])
    deviation = (mean + std * torch.randn_like(std)).std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    vae.save_pretrained(folder)
    print(f"latents: standard deviation {deviation:.4f}, scaling_factor {1 / deviation:.4f}")
    test, _, _ = load_split(data, "test")
    error = (reconstruct(vae, test).float() - test.float()).abs().mean().item()
    print(f"{folder}: mean absolute error of {len(test):,} test images {error:.2f} of 255")


@torch.inference_mode()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and std of uint8 images, both (N, 4, 8, 8), not scaled."""
    posteriors = [vae.encode(batch.float() / 127.5 - 1).latent_dist for batch in images.split(250)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 images -> encoded to the posterior mean, decoded, uint8 again."""
    decoded = torch.cat([vae.decode(encode_images(vae, batch)[0]).sample for batch in images.split(250)])
    return ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def make_tokenizer() -> CLIPTokenizer:
    """Every word of the captions one token, any other text letter by letter.

    A word is merged from its end: every merge takes one letter to a piece with "</w>", so no two words get in each
    other's way, whatever the order. (The library's own training gives other ids in every run.)
    """
    words = sorted(set(" ".join(CAPTIONS).replace("-", " - ").split()))
    merges = [(word[i], word[i + 1 :] + "</w>") for word in words for i in reversed(range(len(word) - 1))]
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=16)


def make_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The untrained pipeline: the given VAE, random U-Net and text encoder, Stable Diffusion's noise schedule."""
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 96, 96),  # the last two alike, as bk_tiny drops the last
        layers_per_block=2,
        norm_num_groups=16,
        attention_head_dim=4,  # as in Stable Diffusion 1.x, where the name hides the number of heads
        cross_attention_dim=64,
    )
    scheduler = PNDMScheduler(  # Stable Diffusion's settings
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    text_encoder = CLIPTextModel(text_config).eval().requires_grad_(False)
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)  # at CLIP's 0.02, untrained layers drown words
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_whole(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write beside `folder` and rename, so that a killed run leaves no half of a pipeline."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def make_teacher(data: Path, vae: Path, folder: Path, steps: int) -> None:
    """Train the U-Net on latents encoded once; save its EMA in a pipeline every 250 steps and at the end."""
    if not (vae / "config.json").is_file():
        raise ValueError(f"--vae: {vae} holds no AutoencoderKL. Train one with the command `vae`.")
    autoencoder = AutoencoderKL.from_pretrained(vae, use_safetensors=True).eval().requires_grad_(False)
    pipeline = make_pipeline(autoencoder)
    unet = pipeline.unet.train()
    print(f"U-Net: {sum(p.numel() for p in unet.parameters()):,} parameters")

    images, texts, _ = load_split(data, "train")
    mean, std = (x * autoencoder.config.scaling_factor for x in encode_images(autoencoder, images))
    captions = ["", *CAPTIONS]
    with torch.inference_mode():
        embeddings, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)  # (41, 16, 64)
    caption_of_row = torch.tensor([captions.index(text) for text in texts])

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=steps)
    ema = EMAModel(unet.parameters(), decay=0.999, foreach=True)
    start, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rows = torch.randint(len(mean), (BATCH,))
        clean = mean[rows] + std[rows] * torch.randn_like(mean[rows])  # a sample of the posterior, (B, 4, 8, 8)
        dropped = torch.rand(BATCH) < EMPTY_PROMPTS
        condition = embeddings[caption_of_row[rows].masked_fill(dropped, 0)]  # (B, 16, 64); row 0 is ""
        noise = torch.randn_like(clean)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        prediction = unet(scheduler.add_noise(clean, noise, timestep), timestep, condition).sample
        loss = F.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(unet.parameters())
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step}: mean loss {total / 100:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            total = 0.0
        if step % 250 == 0 or step == steps:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            save_whole(pipeline, folder)
            ema.restore(unet.parameters())


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """One image per prompt, (N, 3, 32, 32) uint8, in batches of 100 prompts."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    options["generator"] = torch.Generator().manual_seed(seed)
    batches = [pipeline(prompts[i : i + 100], **options).images for i in range(0, len(prompts), 100)]
    return (torch.cat(batches) * 255).round().to(torch.uint8)


def measure(folder: Path, data: Path, samples: int, steps: int, guidance: float, grid: Path | None) -> None:
    """Print how well samples match their prompts and the test images; write a grid, one row per class."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no pipeline. Train one with the command `teacher`.")
    extractor = FeatureExtractor(CLASSIFIER)
    head = AutoModelForImageClassification.from_pretrained(CLASSIFIER).classifier  # of the same features

    @torch.inference_mode()
    def judge(images: Tensor) -> tuple[FeatureStatistics, Tensor]:
        """(N, 3, 32, 32) uint8 -> features and class (N,) of the images at 16x16, shrunk as make_assets.py does."""
        small = (F.avg_pool2d(images.float(), 2) + 0.5).floor().to(torch.uint8)
        features = torch.cat([extractor(batch) for batch in small.split(500)])
        (statistics := FeatureStatistics()).update(features)
        return statistics, head(features).argmax(1)

    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    if grid is not None:
        images = sample(pipeline, [noun for noun in NOUNS for _ in range(10)], steps, guidance, seed=SEED)
        save_image(images.float() / 255, grid, nrow=10, padding=1)

    test, _, labels = load_split(data, "test")
    reference, _ = judge(test)
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(SEED))[:samples]
    wanted = torch.arange(samples) % len(NOUNS)
    start = time.perf_counter()
    generated = sample(pipeline, [NOUNS[label] for label in wanted], steps, guidance, seed=SEED + 1)
    print(f"{samples:,} samples, {steps} steps, guidance {guidance}: {time.perf_counter() - start:.0f} s\n")
    rows = {
        "test images, as many": (test[chosen], labels[chosen]),
        "the same through the VAE": (reconstruct(pipeline.vae, test[chosen]), labels[chosen]),
        "samples": (generated, wanted),
    }
    print("| images | classified as named | Frechet distance to the test images |\n|---|---|---|")
    for name, (images, names) in rows.items():
        found, classes = judge(images)
        distance = frechet_distance(reference.mean, reference.cov, found.mean, found.cov)
        print(f"| {name} | {(classes == names).float().mean():.1%} | {distance:.2f} |")
    right = (classes == wanted).float()  # of the last row, the samples
    print("\n" + ", ".join(f"{noun} {right[wanted == i].mean():.0%}" for i, noun in enumerate(NOUNS)))


def main() -> None:
    """Do what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("folder", type=Path, help="folder to write, or to measure")
    data.add_argument("--data", type=Path, required=True, help="the folder that `dataset` wrote")

    dataset = commands.add_parser("dataset", help="write the captioned images as parquet (half a minute)")
    dataset.add_argument("folder", type=Path, help="folder to write")
    dataset.add_argument("--source", type=Path, default=Path(DEBIAN_FOLDER), help="of the four .gz (%(default)s)")
    vae = commands.add_parser("vae", parents=[data], help="train the AutoencoderKL")
    vae.add_argument("--steps", type=int, default=3000, help="optimizer steps of 32 images (default: %(default)s)")
    teacher = commands.add_parser("teacher", parents=[data], help="train the U-Net")
    teacher.add_argument("--vae", type=Path, required=True, help="the folder that `vae` wrote")
    teacher.add_argument("--steps", type=int, default=4000, help="optimizer steps of 64 images (default: %(default)s)")
    check = commands.add_parser("measure", parents=[data], help="class accuracy and Frechet distance of samples")
    check.add_argument("--samples", type=int, default=1000, help="images, of all classes alike (%(default)s)")
    check.add_argument("--steps", type=int, default=25, help="PNDM steps (default: %(default)s)")
    check.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance (%(default)s)")
    check.add_argument("--grid", type=Path, help="png to write: a row of ten samples for each class")
    args = vars(parser.parse_args())
    step = {"dataset": make_dataset, "vae": make_vae, "teacher": make_teacher, "measure": measure}[args.pop("command")]
    step(**args)


if __name__ == "__main__":
    main()
