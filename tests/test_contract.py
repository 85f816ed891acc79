# SPDX-License-Identifier: Apache-2.0
"""What every backbone must do, trained for a few steps from a tiny teacher: one entry in `KINDS` for each of them."""

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import build_unet, read_log, run_script, save_images
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from latent_pipelines import save_captioned, save_classes, save_dit, save_pipeline, save_sd3
from PIL import Image
from safetensors.torch import load_file
from test_html_report import Page, check_alone

from utils.backbones import choose_backbone
from utils.backbones.encoders import Frozen
from utils.backbones.process import Noised
from utils.backbones.variance import LearnedVariance
from utils.data.rows import ImageRows, load_rows, sample_batch
from utils.distillation.losses import lift_loss, place_loss
from utils.randomness import StepRandom, shuffled

ROWS, BATCH, STEPS = 12, 4, 4  # the last step is in the second epoch
COMMON = f"--max_train_steps {STEPS} --train_batch_size {BATCH} --logging_steps 1 --report_to none --num_cpu_threads 1"
WHOLE = (
    "--lambda_kd_feat 1 --use_ema --ema_decay 0.5 --random_flip --learning_rate 1e-3 --checkpointing_steps 2 "
    "--checkpoints_total_limit 9"
).split()
SAMPLES = ["--validation_shown_samples", "2", "--validation_num_inference_steps", "2"]
NO_SAMPLES = ["--validation_shown_samples", "0"]


@dataclass
class Kind:
    """A backbone with a tiny teacher, and its runs by name: one run serves several tests."""

    folder: Path
    pipeline_class: type
    teacher: Path
    data: list  # flags
    flags: list  # how the student is made, and what else this kind alone understands
    encode: Callable  # (pipeline, batch, captions, rng, args) -> what the denoiser sees of a batch, by stock parts
    noise: Callable  # (pipeline, clean, rng, args) -> Noised, by the stock scheduler
    script: str = "train_place"
    loss: Callable = place_loss
    prompt: tuple = ()  # what the stock pipeline is called with
    component: str = "unet"
    cached: bool = False  # `--cache_dir` is for it
    runs: dict[str, Path] = field(default_factory=dict)

    def run(self, name: str, *flags, data: bool = True) -> Path:
        """The output folder of the run of this name, made when first asked for."""
        if name not in self.runs:
            given = ["--pretrained_model_name_or_path", self.teacher, *COMMON.split(), *self.flags]
            given += self.data if data else []
            folder = run_script(self.folder, "", "", self.script, *given, *flags, output=name, defaults=False)
            self.runs[name] = folder
        return self.runs[name]

    @property
    def whole(self) -> Path:
        return self.runs["whole"]


# The kinds


def pixels(_pipeline, batch, _captions, _rng, _args) -> tuple[torch.Tensor, dict]:
    return batch["pixels"] / 127.5 - 1, {}


def latents(pipeline, batch, captions, rng, args) -> tuple[torch.Tensor, dict]:
    posterior = pipeline.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist
    noise = rng.normal(posterior.mean.shape)
    dropped = rng.uniform((len(captions),)) < args.proportion_empty_prompts
    prompts = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:  # what the stock pipeline guides away from
            embeds, pooled = (torch.where(dropped.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in (embeds, pooled))
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch["time_ids"]}}
    else:
        embeds, added = pipeline.encode_prompt(prompts, "cpu", 1, False)[0], {}
    scale = pipeline.vae.config.scaling_factor
    return scale * (posterior.mean + posterior.std * noise), {"encoder_hidden_states": embeds, **added}


def diffused(pipeline, clean, rng, args) -> Noised:
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    timestep = rng.integers(1000, BATCH)
    noise = rng.normal(clean.shape)
    if args.noise_offset:
        noise = noise + args.noise_offset * rng.normal((*clean.shape[:2], 1, 1))
    a = scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
    x_t = a.sqrt() * clean + (1 - a).sqrt() * noise
    velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
    target = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[scheduler.config.prediction_type]
    return Noised(x_t, timestep, timestep, clean, target, None)


def flowed(pipeline, clean, rng, _args) -> Noised:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    share = compute_density_for_timestep_sampling("logit_normal", BATCH, 0.0, 1.0, generator=rng.generator)
    step = (share * 1000).long()
    time, noise = scheduler.timesteps[step], rng.normal(clean.shape)
    return Noised(scheduler.scale_noise(clean, time, noise), 999 - step, time, clean, noise - clean, None)


def build_ddpm(folder: Path, prediction_type: str = "epsilon", **more) -> Kind:
    DDPMPipeline(build_unet(), DDPMScheduler(prediction_type=prediction_type)).save_pretrained(folder / "teacher")
    data = ["--dataset_name", save_images(folder / "data", count=ROWS)]
    flags = ["--pruning_ratio", "0.5", "--student_init", "magnitude"]
    return Kind(folder, DDPMPipeline, folder / "teacher", data, flags, pixels, diffused, **more)


def build_latent(folder: Path, name: str, pipeline_class: type, **more) -> Kind:
    teacher = save_pipeline(folder / "teacher", name)
    data = ["--train_data_dir", save_captioned(folder / "images", ROWS)]
    flags = "--student_preset bk_small --proportion_empty_prompts 0.4 --noise_offset 0.1 --cache_variants 2".split()
    more |= {"prompt": ("a b",), "cached": True}
    return Kind(folder, pipeline_class, teacher, data, flags, latents, diffused, **more)


def classes(pipeline, batch, _captions, rng, args) -> tuple[torch.Tensor, dict]:
    posterior = pipeline.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist
    latent = posterior.mean + posterior.std * rng.normal(posterior.mean.shape)
    dropped = rng.uniform((len(batch["label"]),)) < args.proportion_empty_prompts
    null = pipeline.transformer.config.num_embeds_ada_norm
    return pipeline.vae.config.scaling_factor * latent, {"class_labels": batch["label"].masked_fill(dropped, null)}


def build_dit(folder: Path) -> Kind:
    teacher, data = save_dit(folder / "teacher"), ["--train_data_dir", save_classes(folder / "images", ROWS)]
    flags = "--student_depth 2 --proportion_empty_prompts 0.4 --noise_offset 0.1 --cache_variants 2".split()
    more = {"prompt": ([3], 1.0), "cached": True, "component": "transformer"}
    return Kind(folder, DiTPipeline, teacher, data, flags, classes, diffused, **more)


def prompted(pipeline, batch, captions, rng, args) -> tuple[torch.Tensor, dict]:
    posterior, vae = pipeline.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist, pipeline.vae.config
    latent = posterior.mean + posterior.std * rng.normal(posterior.mean.shape)
    dropped = rng.uniform((len(captions),)) < args.proportion_empty_prompts
    prompts = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    told = {"device": "cpu", "do_classifier_free_guidance": False, "max_sequence_length": args.max_sequence_length}
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, **told)
    clean = (latent - vae.shift_factor) * vae.scaling_factor
    return clean, {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def build_sd3(folder: Path) -> Kind:
    teacher, data = save_sd3(folder / "teacher"), ["--train_data_dir", save_captioned(folder / "images", ROWS)]
    flags = "--student_depth 2 --proportion_empty_prompts 0.4 --cache_variants 2 --max_sequence_length 24".split()
    more = {"prompt": ("a b",), "cached": True, "component": "transformer"}
    return Kind(folder, StableDiffusion3Pipeline, teacher, data, flags, prompted, flowed, **more)


KINDS = {
    "ddpm": build_ddpm,
    "sd1": lambda folder: build_latent(folder, "sd1", StableDiffusionPipeline),
    "sd2": lambda folder: build_latent(folder, "sd2", StableDiffusionPipeline, script="train_lift", loss=lift_loss),
    "xl": lambda folder: build_latent(folder, "xl", StableDiffusionXLPipeline),
    "dit": build_dit,
    "sd3": build_sd3,
}


# by default three kinds: sd2's target is tried on pixels too, what the others have of their own in files of theirs
SLOW = {"sd2", "xl", "sd3"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KINDS]
)
def kind(request, tmp_path_factory) -> Kind:
    """With its run `whole`, made here, where no test's stand-in is in the way: as a user's, from plan to card."""
    made = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    made.run("whole", *WHOLE, *SAMPLES)
    return made


def denoiser(folder: Path) -> dict[str, torch.Tensor]:
    """Of a pipeline's folder."""
    (path,) = (path for name in ("unet", "transformer") for path in folder.glob(f"{name}/*.safetensors"))
    return load_file(path)


def checkpoint(folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder)]


# The contract


def test_the_student_is_a_stock_pipeline(kind):
    pipeline = kind.pipeline_class.from_pretrained(kind.whole)
    assert type(DiffusionPipeline.from_pretrained(kind.whole)) is kind.pipeline_class
    size = 8 if kind.encode is pixels else 32
    assert pipeline(*kind.prompt, num_inference_steps=2).images[0].size == (size, size)
    stored = denoiser(kind.whole)
    assert len(stored) > 20 and sum(map(torch.numel, stored.values())) < sum(
        map(torch.numel, denoiser(kind.teacher).values())
    )
    for path in kind.teacher.glob(
        "*/*"
    ):  # everything but the denoiser is the teacher's, of a latent one byte for byte
        name = path.relative_to(kind.teacher)
        if path.is_file() and name.parts[0] != kind.component:
            assert (kind.whole / name).exists()
            assert not kind.cached or (kind.whole / name).read_bytes() == path.read_bytes(), name


def test_a_run_leaves_what_a_user_reads(kind):
    plain = 2 * 68 + 8  # teacher above student; what stands above a column needs more
    width, height = Image.open(kind.whole / "samples.png").size
    assert width > 2 * 68 and height > plain
    columns = kind.whole / "samples" / "columns.txt"
    assert columns.exists() == kind.cached
    if kind.cached:
        shown = ["1 a", "2 b"] if kind.pipeline_class.__name__ == "DiTPipeline" else ["1 a d", "2 b k"]
        assert columns.read_text().splitlines() == shown and height > plain + 40
    assert Image.open(kind.whole / "losses.png").size[0] > 900
    card = (kind.whole / "README.md").read_text()
    name = kind.pipeline_class.__name__.replace("DDPM", "DDIM")  # whose own pipeline needs every step
    assert card.startswith("---\nlibrary_name: diffusers\n") and f"import {name}\n" in card
    code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
    namespace = {}
    exec(code, namespace)  # with a prompt or a class of the data, where the family has them
    assert namespace["image"].size[0] == (32 if kind.cached else 8)
    assert check_alone(Page(kind.whole / "report.html")) > 2
    for name in ("variance", "output_variance"):  # every term of the loss is in its equations
        assert (f"\n{name} = " in card) == (name in read_log(kind.whole)[-1])


def test_the_export_reloads_bit_for_bit(kind):
    """Into the stock class and into the next run; it is the average, not the last weights, and has no projectors."""
    stored = denoiser(kind.whole)
    stock = getattr(kind.pipeline_class.from_pretrained(kind.whole), kind.component)
    average = checkpoint(kind.whole, STEPS, "ema")
    for i, (name, parameter) in enumerate(stock.named_parameters()):
        assert torch.equal(parameter, stored[name]) and torch.equal(parameter, average[str(i)]), name
    assert not any("projector" in name for name in stored)
    live = checkpoint(kind.whole, STEPS, "student")
    assert any(not torch.equal(live[f"denoiser.{name}"], tensor) for name, tensor in stored.items())
    args = arguments(kind.whole)
    args.pruning_ratio = args.student_preset = args.student_depth = None
    args.student_model_name_or_path = str(kind.whole)
    again, _ = choose_backbone(args).load(args).make_student(args, {})
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in stored.items())


def test_features_are_distilled(kind):
    log = read_log(kind.whole)
    assert [line["step"] for line in log] == [*range(1, STEPS + 1)]
    for line in log:
        assert line["feature"] > 0
        terms = ("task", "variance", "output", "output_variance", "feature")
        assert line["loss"] == pytest.approx(sum(line.get(name, 0) for name in terms), rel=1e-6)
    first, last = (checkpoint(kind.whole, step, "student") for step in (2, STEPS))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert {name for name in first if name.startswith("projectors.")} <= moved
    assert len(moved) > 0.9 * len(first)


def arguments(folder: Path) -> Namespace:
    return Namespace(**json.loads((folder / "args.json").read_text())["arguments"])


TRACED = (
    "--random_flip --learning_rate 1e-3 --seed 3 --use_ema --lr_scheduler cosine --lr_warmup_steps 1 "
    "--adam_epsilon 1e-3 --validation_shown_samples 0 --lambda_task 0.2 --lambda_kd_output 0.8"
).split()
RATES = [0, 1, 0.75, 0.25]  # of the peak: cosine after a warm-up of one step


def assert_traced(kind: Kind) -> None:
    """The losses of a run, and the weights that it exports, are those of the loop below."""
    folder = kind.run("traced", *TRACED)
    args = arguments(folder)
    backbone = choose_backbone(args).load(args)
    dataset = ImageRows(load_rows(args), backbone.transform(args), 3, variants=args.cache_variants, quiet=True)
    student, _ = backbone.make_student(args, sample_batch(dataset, BATCH, 3))
    pipeline = kind.pipeline_class.from_pretrained(kind.teacher)
    captions = dataset.captions(ROWS) if kind.encode in (latents, prompted) else [None] * ROWS
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0, eps=1e-3)
    ema = EMAModel(student.parameters(), decay=args.ema_decay)
    for step, (rate, expected) in enumerate(zip(RATES, losses(folder), strict=True)):
        rng = StepRandom(3, step)
        places = [divmod(place, ROWS) for place in range(BATCH * step, BATCH * (step + 1))]
        rows = [(epoch, int(shuffled(3, epoch, ROWS)[place])) for epoch, place in places]
        batch = dataset.__getitems__(rows)
        with torch.no_grad():
            clean, condition = kind.encode(pipeline, batch, [captions[row] for _, row in rows], rng, args)
        noised = kind.noise(pipeline, clean, rng, args)
        prediction = student(noised.x_t, timestep=noised.time, **condition).sample
        with torch.no_grad():
            teacher = getattr(pipeline, kind.component)
            teacher_prediction = teacher(noised.x_t, timestep=noised.time, **condition).sample
        task, output = 0.0, 0.0
        if kind.pipeline_class is DiTPipeline:  # which predicts variances too
            learned = LearnedVariance(DDPMScheduler.from_config(pipeline.scheduler.config))
            (prediction, ours), (teacher_prediction, theirs) = prediction.chunk(2, 1), teacher_prediction.chunk(2, 1)
            task, output = learned.bound(prediction, ours, noised), learned.distance(ours, theirs, noised)
        task = task + F.mse_loss(prediction, noised.target)
        loss = 0.2 * task + 0.8 * (output + kind.loss(prediction, teacher_prediction).loss)
        assert loss.item() == pytest.approx(expected, rel=1e-4), step
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(student.parameters())
    exported = denoiser(folder)
    for (name, _), expected in zip(student.named_parameters(), ema.shadow_params, strict=True):
        torch.testing.assert_close(exported[name], expected.detach(), rtol=1e-3, atol=1e-5)


def test_losses_and_weights_equal_a_plain_loop(kind):
    assert_traced(kind)


@pytest.mark.parametrize(
    "target, script, loss", [("v_prediction", "train_lift", lift_loss), ("sample", "train_place", place_loss)]
)
def test_losses_and_weights_of_other_targets(tmp_path, target, script, loss):
    assert_traced(build_ddpm(tmp_path, target, script=script, loss=loss))


def test_gradient_checkpointing_computes_the_same(kind):
    again = kind.run("checkpointed", *WHOLE, *NO_SAMPLES, "--max_train_steps", "2", "--gradient_checkpointing")
    assert losses(again) == pytest.approx(losses(kind.whole)[:2], rel=1e-4)


def test_resume_is_exact(kind):
    stopped = kind.folder / "stopped"
    shutil.copytree(kind.whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS:07d}")
    kind.run("stopped", *WHOLE, *NO_SAMPLES, "--resume_from_checkpoint", "latest")
    assert (stopped / "log.jsonl").read_text() == (kind.whole / "log.jsonl").read_text()
    for name in ("student", "ema", "optimizer"):
        ours, theirs = (checkpoint(folder, STEPS, name) for folder in (stopped, kind.whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert all(torch.equal(denoiser(stopped)[name], tensor) for name, tensor in denoiser(kind.whole).items())


def test_training_from_the_cache_is_training_without_it(kind, monkeypatch):
    if not kind.cached:
        pytest.skip("pixels need no encoding")
    expected = losses(kind.run("traced", *TRACED))
    cache = [*TRACED, "--latent_cache_dir", kind.folder / "cache"]
    made = kind.run("cache_made", *cache)
    assert losses(made) == pytest.approx(expected, rel=1e-6)
    # without the images, and the encoders may not load
    monkeypatch.setattr(Frozen, "_loaded", lambda *_, **__: pytest.fail("an encoder was loaded"))
    assert losses(kind.run("cache_read", *cache, data=False)) == losses(made)
