# SPDX-License-Identifier: Apache-2.0
"""Latent students: Stable Diffusion 1.x, 2.x and XL, trained by both scripts on tiny complete pipelines."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import read_log, run_script
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from latent_pipelines import SD_BETAS, save_captioned, save_pipeline
from PIL import Image
from safetensors.torch import load_file

import analyze_error
import evaluate_fid
import train_place
from utils.backbones import choose_backbone
from utils.backbones.encoders import Frozen
from utils.backbones.stable_diffusion import StableDiffusion
from utils.command_line import call
from utils.data.cache import CachedRows, encoded_once, open_dataset
from utils.data.cache_key import FORMAT
from utils.data.rows import ImageRows, StreamSampler, load_rows, training_batches
from utils.randomness import StepRandom
from utils.training.arguments import parse_args
from utils.training.validation import Validation

KINDS = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
BRIEFLY = (
    "--train_batch_size 4 --logging_steps 1 --validation_shown_samples 0 --report_to none --num_cpu_threads 1".split()
)
SLOWLY_SD1 = pytest.param("sd1", "bk_base", marks=pytest.mark.slow)
SLOWLY_XL = pytest.param("xl", "bk_base", marks=pytest.mark.slow)
SD1_AND_SLOWLY_XL = ["sd1", pytest.param("xl", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_pipeline(tmp_path_factory.mktemp("teachers") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return save_captioned(tmp_path_factory.mktemp("pictures") / "images")


@pytest.fixture
def train(run, teachers, pictures):
    """`train("sd1", "--flag", value ...)`: a short run of train_place.py; flags in the call win."""

    def train_latent(kind="sd1", *flags, script="train_place", data=True, **options):
        given = [
            "--pretrained_model_name_or_path",
            teachers[kind],
            "--max_train_steps",
            "3",
        ]
        given += ["--train_data_dir", pictures] if data else []
        given += BRIEFLY
        students = ("--student_preset", "--student_config", "--student_model_name_or_path", "--pruning_ratio")
        given += [] if any(flag in flags for flag in students) else ["--student_preset", "bk_small"]
        return run(script, *given, *flags, defaults=False, **options)

    return train_latent


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder)]


def parsed(*flags):
    return parse_args("", train_place.add_method_arguments, [str(flag) for flag in flags])


def load(teacher: Path, *flags) -> StableDiffusion:
    student = () if "--student_config" in flags else ("--student_preset", "bk_small")
    args = parsed("--pretrained_model_name_or_path", teacher, "--train_data_dir", "unused", *student, *flags)
    return choose_backbone(args).load(args)


def unet_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


# The student


@pytest.mark.parametrize("kind, preset", [SLOWLY_SD1, ("sd1", "bk_tiny"), SLOWLY_XL])
def test_presets_train_with_feature_distillation(train, kind, preset):
    flags = ["--student_preset", preset, "--lambda_kd_feat", "1", "--gradient_checkpointing"]
    folder = train(kind, *flags, "--max_train_steps", "1")
    assert len(losses(folder)) == 1
    DiffusionPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_a_config_of_another_size_takes_what_fits(train, teachers, tmp_path):
    config = json.loads((teachers["sd1"] / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = train("sd1", "--student_config", tmp_path / "config.json", "--lambda_kd_feat", "1")
    assert any(
        name.startswith("projectors.") for name in load_file(folder / "checkpoints/step-0000003/student.safetensors")
    )
    again = train("sd1", "--student_model_name_or_path", folder, "--max_train_steps", "1", output="again")
    assert unet_tensors(again).keys() == unet_tensors(folder).keys()


# The forward process and the targets


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_target_recovers_the_clean_latents(teachers, kind):
    backbone = load(teachers[kind])
    clean, timestep = torch.randn(5, 4, 16, 16), torch.tensor([0, 10, 500, 900, 999])
    noise = torch.randn_like(clean)
    noised = backbone.process.noised(clean, noise, timestep)
    scheduler = DDPMScheduler(**SD_BETAS)
    a = scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised.x_t, a.sqrt() * clean + (1 - a).sqrt() * noise)
    if kind == "sd1":
        assert noised.target is noise
        recovered = (noised.x_t - (1 - a).sqrt() * noised.target) / a.sqrt()
    else:
        torch.testing.assert_close(noised.target, scheduler.get_velocity(clean, noise, timestep))
        recovered = a.sqrt() * noised.x_t - (1 - a).sqrt() * noised.target
    torch.testing.assert_close(recovered, clean, rtol=1e-3, atol=1e-3)


def test_zero_terminal_snr_is_respected(teachers, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teachers["sd2"], folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(config))
    backbone = load(folder, "--snr_gamma", "5")
    noise = torch.randn(1, 4, 16, 16)
    noised = backbone.process.noised(torch.randn_like(noise), noise, torch.tensor([999]))
    torch.testing.assert_close(noised.x_t, noise, atol=1e-3, rtol=0)  # nothing of the image is left
    assert noised.weight.isfinite().all()


def test_noise_offset_is_one_value_a_channel(teachers):
    clean = torch.zeros(2, 4, 16, 16)
    plain = load(teachers["sd1"]).add_noise(clean, StepRandom(0, 0)).target
    offset = load(teachers["sd1"], "--noise_offset", "0.5").add_noise(clean, StepRandom(0, 0)).target
    difference = offset - plain
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert difference.std() > 0.1


# Captions


def row_batch(backbone, pictures, rows=(0, 1, 2, 3)):
    args = backbone.args
    args.train_data_dir = str(pictures)
    dataset = ImageRows(load_rows(args), backbone.transform(args), args.seed, variants=args.cache_variants, quiet=True)
    return dataset.__getitems__([(0, row) for row in rows]), dataset


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_latents_and_embeddings_are_the_pipelines_own(teachers, pictures, kind):
    backbone = load(teachers[kind], "--proportion_empty_prompts", "0", "--center_crop")
    batch, dataset = row_batch(backbone, pictures)
    latents, condition = backbone.encode(batch, StepRandom(0, 0))
    pipeline = KINDS[kind].from_pretrained(teachers[kind])
    captions = dataset.captions(4)
    embeds = pipeline.encode_prompt(
        captions,
        **({"device": "cpu", "num_images_per_prompt": 1} if kind == "sd1" else {}),
        do_classifier_free_guidance=False,
    )
    torch.testing.assert_close(condition["encoder_hidden_states"], embeds[0], atol=1e-5, rtol=1e-4)
    posterior = pipeline.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist
    noise = StepRandom(0, 0).normal(latents.shape)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * 0.5, atol=1e-5, rtol=1e-4)
    if kind == "xl":
        added = condition["added_cond_kwargs"]
        torch.testing.assert_close(added["text_embeds"], embeds[2], atol=1e-5, rtol=1e-4)
        # 36x48 pixels: the shorter side to 32 makes 32x43, whose centre starts at 5
        assert added["time_ids"].tolist() == [[36, 48, 0, 5, 32, 32]] * 4


def test_micro_conditioning_tells_where_the_crop_is(teachers, pictures):
    backbone = load(teachers["xl"], "--random_flip")
    batch, dataset = row_batch(backbone, pictures, rows=range(12))
    flipped = 0
    for row in range(12):
        whole = dataset.held[row]
        _, _, top, left, *_ = batch["time_ids"][row].int().tolist()
        crops = [side[:, top : top + 32, left : left + 32] for side in (whole, whole.flip(-1))]
        equal = [torch.equal(crop, batch["pixels"][row]) for crop in crops]
        assert any(equal)
        flipped += equal[1]
    assert 2 < flipped < 11 and len(set(batch["time_ids"][:, 3].tolist())) > 4


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_teacher_and_student_see_the_same_prompts_some_of_them_empty(teachers, pictures, share):
    backbone = load(teachers["xl"], "--proportion_empty_prompts", share)
    batch, _ = row_batch(backbone, pictures, rows=range(12))
    _, condition = backbone.encode(batch, StepRandom(3, 0))
    full = backbone.cache_rows(batch)
    empty = backbone.conditions.empty()
    kept = [
        torch.equal(ours, theirs)
        for ours, theirs in zip(condition["encoder_hidden_states"], full["prompt_embeds"], strict=True)
    ]
    dropped = [torch.equal(ours, empty["prompt_embeds"][0]) for ours in condition["encoder_hidden_states"]]
    pooled = [torch.equal(ours, empty["pooled"][0]) for ours in condition["added_cond_kwargs"]["text_embeds"]]
    assert dropped == pooled and all(a != b for a, b in zip(kept, dropped, strict=True))
    assert {0.0: sum(dropped) == 0, 0.5: 2 < sum(dropped) < 10, 1.0: sum(dropped) == 12}[share]


def test_both_models_get_the_same_tensors(train, monkeypatch):
    seen = []
    original = StableDiffusion.predict

    def spy(self, model, noised, condition):
        seen.append((noised.x_t, condition["encoder_hidden_states"], model.denoiser is self.teacher))
        return original(self, model, noised, condition)

    monkeypatch.setattr(StableDiffusion, "predict", spy)
    train("sd1", "--proportion_empty_prompts", "0.5")
    assert [teacher for *_, teacher in seen] == [False, True] * 3
    for ours, theirs in zip(seen[::2], seen[1::2], strict=True):
        assert ours[0] is theirs[0] and ours[1] is theirs[1]


def test_one_of_several_captions_is_drawn(teachers, tmp_path):
    folder = save_captioned(tmp_path / "images", captions=[["a", "b", "c"]])
    backbone = load(teachers["sd1"])
    _, dataset = row_batch(backbone, folder)
    ids = [dataset.__getitems__([(epoch, row) for row in range(12)])["input_ids_0"][:, 1] for epoch in range(4)]
    counts = torch.stack(ids).flatten().unique(return_counts=True)[1]
    assert len(counts) == 3 and counts.min() > 5


def test_captions_that_are_missing_count_the_same_in_every_row(teachers, tmp_path):
    backbone = load(teachers["sd1"])
    for place, captions in enumerate(([None, "a", ""], ["", None, "a"], [[], ["a"], None], [[None], [""], ["a"]])):
        batch, dataset = row_batch(backbone, save_captioned(tmp_path / str(place), 3, captions), (0, 1, 2))
        empty = [not caption or not caption[0] for caption in captions]
        assert [not text for text in dataset.captions(3)] == empty
        lengths = (batch["input_ids_0"] != backbone.conditions.tokenizers[0].pad_token_id).sum(dim=1)
        assert (lengths == lengths.min()).tolist() == empty
    with pytest.raises(ValueError, match="--caption_column text: found .*int64.* a caption is a string or a list"):
        row_batch(backbone, save_captioned(tmp_path / "numbers", 3, [1, 2, 3]))


# Cache


def test_a_cache_knows_which_rows_were_replaced(teachers, tmp_path):
    folder = save_captioned(tmp_path / "images", 6)
    (folder / "01.png").write_bytes(b"no image")
    (folder / "04.png").unlink()
    given = ["--latent_cache_dir", tmp_path / "cache", "--skip_bad_images", "--train_batch_size", "3", "--center_crop"]
    backbone, accelerator = load(teachers["sd1"], *given), Accelerator(cpu=True)
    backbone.args.train_data_dir = str(folder)
    dataset = open_dataset(backbone.args, accelerator, backbone)
    expected = dataset.__getitems__([(0, row) for row in range(6)])
    cached = encoded_once(backbone.args, accelerator, dataset, backbone)
    found = cached.__getitems__([(0, row) for row in range(6)])
    assert found["replaced"].tolist() == expected["replaced"].tolist() == [False, True, False, False, True, False]
    assert torch.equal(found["latent_mean"][1], found["latent_mean"][2])
    for _ in training_batches(cached, backbone.args, accelerator, first=0, last=3):
        pass
    assert cached.bad_rows == {1, 4}


@pytest.fixture
def cache(cached, tmp_path) -> Path:
    """A complete cache of sd1's rows."""
    return shutil.copytree(cached, tmp_path / "cache")


@pytest.fixture(scope="module")
def cached(tmp_path_factory, teachers, pictures) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    flags = ["--pretrained_model_name_or_path", teachers["sd1"], "--train_data_dir", pictures, *BRIEFLY]
    flags += ["--student_preset", "bk_small", "--latent_cache_dir", folder / "cache", "--max_train_steps", "1"]
    run_script(folder, "", "", "train_place", *flags, defaults=False)
    return folder / "cache"


@pytest.mark.parametrize("kind", SD1_AND_SLOWLY_XL)
def test_cached_rows_are_the_bits_that_training_computes(train, teachers, pictures, tmp_path, kind):
    flags = ["--cache_variants", "2", "--random_flip"]
    train(kind, *flags, "--latent_cache_dir", tmp_path / "cache", "--max_train_steps", "1")
    backbone = load(teachers[kind], *flags)
    cached = CachedRows(tmp_path / "cache", backbone)
    _, dataset = row_batch(backbone, pictures)
    assert torch.equal(
        backbone.conditions.empty()["prompt_embeds"], load(teachers[kind]).conditions.empty()["prompt_embeds"]
    )
    differing = 0
    for micro_step, positions in enumerate(StreamSampler(12, 4, 0, last=9)):
        expected, found = backbone.cache_rows(dataset.__getitems__(positions)), cached.__getitems__(positions)
        for name in expected:
            assert torch.equal(expected[name], found[name]), (micro_step, name)
        first_variant = cached.__getitems__([(0, row) for _, row in positions])
        differing += not torch.equal(first_variant["latent_mean"], found["latent_mean"])
    assert differing == 3  # the second epoch


@pytest.mark.slow
def test_the_encoders_are_freed(train, tmp_path, monkeypatch):
    freed = []
    original = Frozen.free
    monkeypatch.setattr(Frozen, "free", lambda self: (original(self), freed.append((self.subfolder, self.model))))
    train(
        "sd1",
        "--latent_cache_dir",
        tmp_path / "cache",
        "--validation_shown_samples",
        "2",
        "--validation_num_inference_steps",
        "2",
    )
    assert freed == [("vae", None), ("text_encoder", None)] * 3  # after encoding, and after each row of the grid


def test_a_stopped_cache_goes_on(train, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.cache.BLOCK", 4)
    folder = tmp_path / "cache"
    train("sd1", "--latent_cache_dir", folder, output="first")
    files = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(files) == 3 + 4  # 12 rows; 12 captions and the empty one
    kept = folder / "latents-00-000001.safetensors"
    before = kept.stat().st_mtime_ns
    for name in ("latents-00-000002.safetensors", "text-000001.safetensors"):
        (folder / name).rename(folder / f".{name}.partial")  # as a killed process leaves them
    content = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(content | {"complete": False}))
    with pytest.raises(ValueError, match="--latent_cache_dir .* is not complete"):
        train("sd1", "--latent_cache_dir", folder, data=False, output="early")
    train("sd1", "--latent_cache_dir", folder, output="second")
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == files
    assert kept.stat().st_mtime_ns == before


def test_a_cache_of_other_settings_is_refused(train, cache):
    with pytest.raises(ValueError, match="--latent_cache_dir .* other settings: .*random_flip was False, is True"):
        train("sd1", "--latent_cache_dir", cache, "--random_flip")


# LoRA


@pytest.mark.parametrize("kind", SD1_AND_SLOWLY_XL)
@pytest.mark.slow
def test_lora_trains_adapters_alone(train, teachers, kind):
    def named_student(folder) -> dict[str, torch.Tensor]:
        flags = ["--pretrained_model_name_or_path", teachers[kind], "--train_data_dir", "unused"]
        args = parsed(*flags, "--student_model_name_or_path", folder)
        return choose_backbone(args).load(args).make_student(args, {})[0].state_dict()

    flags = ["--lora_rank", "2", "--use_ema", "--ema_decay", "0.5", "--learning_rate", "1e-2"]
    untouched = train(kind, "--learning_rate", "1e-9", "--max_train_steps", "1", output="untouched")
    folder, fused = train(kind, *flags, output="lora"), train(kind, *flags, "--fuse_lora", output="fused")
    assert (folder / "pytorch_lora_weights.safetensors").exists()
    assert not (fused / "pytorch_lora_weights.safetensors").exists()
    for name, tensor in unet_tensors(untouched).items():
        torch.testing.assert_close(unet_tensors(folder)[name], tensor, atol=1e-6, rtol=0)

    def image(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a b", num_inference_steps=2, generator=generator, output_type="np").images

    pipeline = DiffusionPipeline.from_pretrained(folder)
    plain = image(pipeline)
    torch.testing.assert_close(named_student(folder), unet_tensors(fused), atol=1e-5, rtol=0)
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")  # which some guess online alone
    adapted = image(pipeline)
    assert abs(adapted - plain).max() > 1e-3
    assert abs(adapted - image(DiffusionPipeline.from_pretrained(fused))).max() < 1e-3
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="--student_model_name_or_path .*pytorch_lora_weights.safetensors does not"):
        named_student(folder)


# Resume


def test_adapters_resume_exactly(train, tmp_path):
    flags = "--lora_rank 2 --use_ema --max_train_steps 3 --checkpointing_steps 2 --learning_rate 1e-3".split()
    whole = train("sd1", *flags, output="whole")
    shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-0000003")
    again = train("sd1", *flags, "--resume_from_checkpoint", "latest", output="stopped")
    assert read_log(again) == read_log(whole)
    for name in ("student", "ema", "optimizer"):
        files = [load_file(f / "checkpoints" / "step-0000003" / f"{name}.safetensors") for f in (whole, again)]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


# Sampling


def test_a_latent_student_is_measured_to_the_end(train):
    """Noise is drawn in the shape of the images, not of the latents, and the run goes on to its card."""
    flags = ["--validation_feature_extractor", "assets/classifier", "--validation_num_samples", "4"]
    folder = train("sd1", *flags, "--validation_num_inference_steps", "1", "--max_train_steps", "1")
    card = (folder / "README.md").read_text()
    assert "| noise |" in card and "| teacher |" in card and "DDIM, eta 0, 1 step" in card


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_a_validation_runs_the_denoiser_alone_under_autocast(teachers, tmp_path, monkeypatch, kind):
    """And decodes in float32, one image after the other: 16 at once of 1024 pixels a side take 24 GiB."""
    flags = ["--mixed_precision", "bf16", "--validation_prompts", "a b", "--validation_num_inference_steps", "1"]
    backbone = load(teachers[kind], *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    validation = Validation(backbone.args, accelerator, backbone, backbone.teacher, dataset=None)
    dtypes, decode = {"denoiser": set(), "decoder": []}, AutoencoderKL._decode

    def seen(self, z, *args, **options):
        image = decode(self, z, *args, **options)
        dtypes["decoder"] += [(len(z), z.dtype, image.sample.dtype)]
        return image

    monkeypatch.setattr(AutoencoderKL, "_decode", seen)
    conv = backbone.teacher.down_blocks[0].resnets[0].conv1
    with conv.register_forward_hook(lambda _, inputs, output: dtypes["denoiser"].add(output.dtype)):
        assert validation._draw(backbone.teacher, 0, 3).shape == (3, 3, 32, 32)
    assert dtypes == {"denoiser": {torch.bfloat16}, "decoder": [(1, torch.float32, torch.float32)] * 3}
    assert not backbone.vae().use_slicing  # which would encode other last bits in training


# Bad input


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        ("sd1", ["--caption_column", "title"], "--caption_column title: .* only image, text"),
        ("sd1", ["--resolution", "31"], "--resolution 31: the VAE divides it by 2"),
        ("sd1", ["--student_preset", "koala_700m"], "--student_preset koala_700m .*bk_tiny"),
        ("sd1", ["--student_preset", "bk_huge"], "--student_preset bk_huge"),
        ("sd1", ["--pruning_ratio", "0.5"], "--pruning_ratio .*--student_preset .*bk_base"),
        ("sd1", ["--group_size", "257"], "--group_size 257: a channel of 16x16 has only 256"),
        ("sd1", ["--pretrained_vae_model_name_or_path", "nowhere"], "--pretrained_vae_model_name_or_path nowhere"),
        ("sd1", ["--proportion_empty_prompts", "1.5"], "--proportion_empty_prompts is 1.5"),
        ("sd1", ["--latent_cache_dir", "nowhere"], "--latent_cache_dir nowhere: no cache there"),
    ],
)
def test_bad_input(train, kind, flags, message):
    with pytest.raises(ValueError, match=message):
        train(kind, *flags, data="nowhere" not in flags or "--latent_cache_dir" not in flags)


@pytest.mark.slow
def test_a_cache_of_an_earlier_version(train, tmp_path):
    """Its cache.json has no format."""
    folder = tmp_path / "cache"
    train("sd1", "--latent_cache_dir", folder, output="first")
    made = json.loads((folder / "cache.json").read_text())
    assert made.pop("format") == FORMAT
    (folder / "cache.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="--latent_cache_dir .* another version .*format 1, now 3.*another folder"):
        train("sd1", "--latent_cache_dir", folder, output="second")


def test_overwriting_never_deletes_the_cache(tmp_path):
    (tmp_path / "student" / "cache").mkdir(parents=True)
    flags = ["--pretrained_model_name_or_path", "teacher", "--student_preset", "bk_tiny", "--train_data_dir", "images"]
    flags += ["--latent_cache_dir", tmp_path / "student" / "cache", "--output_dir", tmp_path / "student"]
    with pytest.raises(ValueError, match="--overwrite_output_dir would delete .*cache"):
        parsed(*flags, "--overwrite_output_dir")


def test_a_dataset_without_captions(train, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    with pytest.raises(
        ValueError, match="--caption_column text: the dataset has no such column, only image.*metadata"
    ):
        train("sd1", "--train_data_dir", tmp_path / "images")


def test_pixel_teachers_know_no_text(run, tmp_path, teacher_dir, data_dir):
    teacher = ["--pretrained_model_name_or_path", teacher_dir, "--dataset_name", data_dir]
    with pytest.raises(ValueError, match="--student_preset bk_tiny .*--pruning_ratio"):
        run("train_place", *teacher, "--student_preset", "bk_tiny", "--output_dir", tmp_path / "out", defaults=False)
    with pytest.raises(ValueError, match="--lora_rank 2 does not go with.*latent teacher"):
        run("train_place", "--lora_rank", "2")
    with pytest.warns(UserWarning, match="--caption_column has no effect"):
        run("train_place", "--caption_column", "text", "--max_train_steps", "1")


@pytest.mark.slow
def test_cached_rows_are_read_by_data_workers(train, teachers, cache):
    args = [
        train("sd1", "--latent_cache_dir", cache, *workers, data=False, output=f"out-{len(workers)}")
        for workers in ([], ["--dataloader_num_workers", "1"])
    ]
    assert losses(args[0]) == losses(args[1])
    rows = CachedRows(cache, load(teachers["sd1"]))
    first = rows.__getitems__([(0, 3)])
    assert torch.equal(pickle.loads(pickle.dumps(rows)).__getitems__([(7, 3)])["latent_mean"], first["latent_mean"])


# The other scripts


@pytest.mark.slow
def test_analyze_error(train, teachers, pictures, tmp_path, monkeypatch):
    student = train("xl", "--student_preset", "bk_base", "--learning_rate", "1e-2")
    argv = ["--pretrained_model_name_or_path", teachers["xl"], "--student_model_name_or_path", student]
    argv += ["--train_data_dir", pictures, "--num_timesteps", "3", "--num_images", "4", "--num_inference_steps", "2"]
    argv += ["--shown_samples", "3", "--output_dir", tmp_path / "analysis", "--num_cpu_threads", "1"]
    argv += ["--feature_extractor", "assets/classifier", "--num_samples", "14", "--batch_size", "3"]
    drawn = []  # conditions of the samples, of student, corrected student and teacher in turn
    sample = StableDiffusion.sample
    monkeypatch.setattr(StableDiffusion, "sample", lambda *a: drawn.append(a[-1]) or sample(*a))
    call(analyze_error, [str(word) for word in argv])
    analysis = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert sum(drawn[::3], []) == [*captions, *captions[:2]]
    assert analysis["samples"]["num_prompts"] == 12 and analysis["protocol"]["sampler"]["guidance_scale"] == 5
    with np.load(tmp_path / "analysis" / "error_maps.npz") as maps:
        assert maps["image"].shape == maps["image_error"].shape == (3, 4, 16, 16)
    mean = analysis["mean"]
    assert mean["total"] > 0 and mean["coarse"] + mean["fine"] == pytest.approx(mean["total"], rel=1e-6)
    gaps = analysis["samples"]["pixel_difference_to_teacher"]
    assert gaps["teacher"] == 0 < gaps["student"]
    assert (tmp_path / "analysis" / "samples.png").exists()


def test_evaluate_fid(train, teachers, pictures, tmp_path):
    student = train("sd1")
    argv = ["--pretrained_model_name_or_path", student, "--train_data_dir", pictures, "--caption_column", "text"]
    argv += ["--num_samples", "6", "--batch_size", "3", "--num_inference_steps", "2", "--guidance_scale", "3"]
    argv += ["--feature_extractor", "assets/classifier", "--metrics", "fid", "--output_dir", tmp_path / "evaluation"]
    argv += ["--compare_to", teachers["sd1"], "--compare_num_samples", "3"]
    argv += ["--reference_cache_dir", tmp_path / "statistics"]
    call(evaluate_fid, [str(word) for word in argv])
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["metrics"]
    assert Image.open(tmp_path / "evaluation" / "samples.png").size[0] > 64


def test_the_exported_student_is_tuned_on_other_pictures(train, tmp_path):
    student = train("sd1", "--student_preset", "bk_tiny", output="distilled")
    others = save_captioned(tmp_path / "others", seed=5)
    flags = ["--pretrained_model_name_or_path", student, "--student_model_name_or_path", student]
    flags += ["--lambda_kd_output", "0", "--train_data_dir", others, "--learning_rate", "1e-3"]
    tuned = train("sd1", *flags, script="train_lift", output="tuned")
    assert "output" not in read_log(tuned)[0]
    before, after = unet_tensors(student), unet_tensors(tuned)
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-4
    assert StableDiffusionPipeline.from_pretrained(tuned).unet.mid_block is None


def test_a_teachers_variant_is_exported_without_its_name(train, teachers, tmp_path):
    teacher = tmp_path / "fp16"
    StableDiffusionPipeline.from_pretrained(teachers["sd1"]).save_pretrained(teacher, variant="fp16")
    (teacher / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"another format of the same weights")
    folder = train("sd1", "--pretrained_model_name_or_path", teacher, "--variant", "fp16")
    assert sorted(path.name for path in (folder / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    ours, theirs = (folder / "vae", teacher / "vae")
    weights = (ours / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights == (theirs / "diffusion_pytorch_model.fp16.safetensors").read_bytes()
    StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind, other, dtype", [("sd1", 0, "bf16"), ("xl", 0, "fp32"), ("xl", 1, "bf16")])
def test_sdxls_own_vae_stays_in_float32(teachers, pictures, kind, other, dtype):
    flags = ["--pretrained_vae_model_name_or_path", teachers["sd1"] / "vae"] if other else []
    backbone = load(teachers[kind], *flags)
    backbone.teacher.to(torch.bfloat16)
    batch, _ = row_batch(backbone, pictures)
    latents, condition = backbone.encode(batch, StepRandom(0, 0))
    assert backbone.vae().dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert all(encoder().dtype == torch.bfloat16 for encoder in backbone.conditions.encoders)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert condition["encoder_hidden_states"].dtype == torch.float32
    images = backbone.sample(backbone.teacher, [0], 2, ["a b"])  # decoded in float32, whatever the VAE is in
    assert images.shape == (1, 3, 32, 32) and backbone.vae().dtype != torch.float32 or dtype == "fp32"
