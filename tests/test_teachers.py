# SPDX-License-Identifier: Apache-2.0
"""Teachers as strangers bring them: what is trained is what is sampled, what is not whole is refused before training,
and what is exported loads."""

import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from latent_pipelines import build_text_encoder, build_tokenizer, save_pipeline
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPImageProcessor, CLIPTextModelWithProjection

import train_lift
from utils.backbones import choose_backbone
from utils.backbones.base import Configs
from utils.backbones.clip_prompts import zeros_when_empty
from utils.backbones.diffusion import Diffusion, ddpm_scheduler
from utils.backbones.saving import load_back
from utils.backbones.stable_diffusion import StableDiffusion
from utils.command_line import UsageError
from utils.randomness import StepRandom
from utils.students.blocks import presets_for, student_config
from utils.training.arguments import parse_args

TEACHER = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Of two stages each, as most of a test's time would else go by in building U-Nets."""
    folder = tmp_path_factory.mktemp("teachers")
    for kind in ("sd1", "sd2", "xl"):
        save_pipeline(folder / kind, kind)
        wide = json.loads((folder / kind / "unet" / "config.json").read_text())
        small = {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
            "transformer_layers_per_block": 1,
        }
        UNet2DConditionModel.from_config(wide | small).save_pretrained(folder / kind / "unet")
    return {kind: folder / kind for kind in ("sd1", "sd2", "xl")}


@pytest.fixture
def own(teachers, tmp_path):
    """`own("xl")`: a copy of a teacher, to be changed: links, but for its JSON."""

    def copied(kind: str = "sd1") -> Path:
        def link(source, target):
            (shutil.copyfile if source.endswith(".json") else os.link)(source, target)

        return Path(shutil.copytree(teachers[kind], tmp_path / "teacher", copy_function=link))

    return copied


def parsed(teacher, *flags):
    student = [] if any("--student" in str(flag) for flag in flags) else ["--student_preset", "bk_small"]
    flags = [TEACHER, teacher, "--train_data_dir", "unread", *student, *flags]
    return parse_args("", train_lift.add_method_arguments, [str(flag) for flag in flags])


def load(teacher, *flags):
    args = parsed(teacher, *flags)
    return choose_backbone(args).load(args)


def check(teacher, *flags):
    """What happens before weights load."""
    args = parsed(teacher, *flags)
    return choose_backbone(args).check(args)


def judge(folder: Path, *flags) -> None:
    """What `check` says of the parts, without building a student."""
    args = parsed(folder, *flags)
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    configs = Configs(unet, unet, 32, vae, process=None)
    StableDiffusion.check_vae(args, configs)
    StableDiffusion.check_parts(args, configs, StableDiffusion.parts(args))


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def replace(file: Path, tensors: dict) -> None:
    file.unlink(missing_ok=True)  # not through the link
    save_file(tensors, file, metadata={"format": "pt"})


# What is trained is what is sampled

SLOWLY_SD2 = pytest.param("sd2", None, 3, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind, zeros, scale",
    [
        ("sd1", None, None),
        ("sd1", None, 0),
        pytest.param("sd2", None, 3, marks=pytest.mark.slow),
        ("xl", True, None),
        ("xl", False, 3),
    ],
)
def test_samples_equal_the_stock_call(own, kind, zeros, scale):
    folder = own(kind)
    if kind == "xl":
        change(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    flags = [] if scale is None else ["--validation_guidance_scale", scale]
    backbone = load(folder, "--validation_prompts", "a b", "c d", *flags)
    images = backbone.sample(backbone.teacher, [7, 8], 2, backbone.conditions.of_samples(None, 0, 2))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    stock = {} if scale is None else {"guidance_scale": scale}  # without it, the pipeline's own default
    images_of_stock = pipeline(
        ["a b", "c d"], num_inference_steps=2, generator=generators, output_type="np", height=32, width=32, **stock
    ).images
    expected = torch.from_numpy((images_of_stock * 255).round()).permute(0, 3, 1, 2)
    assert (images.float() - expected).abs().max() <= 1
    if kind == "xl":
        assert_told_alike(backbone, pipeline, zeros)
    assert backbone.conditions.of_samples(None, 1, 3) == ["c d", "a b", "c d"]


def assert_told_alike(backbone, pipeline, zeros: bool) -> None:
    """A dropped prompt is what the stock pipeline guides away from."""
    backbone.conditions.share_dropped = 1
    rows = {**backbone.conditions.prompts(["a b"] * 2), "time_ids": torch.zeros(2, 6)}
    condition = backbone.conditions.drop(rows, StepRandom(0, 0))
    _, negative, _, pooled = pipeline.encode_prompt(["a b"] * 2, device="cpu")
    told = condition["encoder_hidden_states"], condition["added_cond_kwargs"]["text_embeds"]
    for ours, theirs in zip(told, (negative, pooled), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert (ours == 0).all() == zeros
    assert backbone.conditions.settings().get("empty_prompt") == ("zeros" if zeros else None)  # a cache's key


@pytest.mark.parametrize("said, zeros", [({}, True), ({"force_zeros_for_empty_prompt": False}, False)])
def test_where_nothing_is_said_the_pipelines_default_holds(tmp_path, said, zeros):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **said}))
    assert zeros_when_empty(str(tmp_path), None) == zeros


@pytest.mark.parametrize(
    "name, config, why",
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "as turbo models"),
        ("LCMScheduler", {}, "is a LCMScheduler"),
        ("TCDScheduler", {}, "is a TCDScheduler"),
    ],
)
def test_distilled_models_are_sampled_without_guidance(own, caplog, name, config, why):
    folder = own()
    getattr(diffusers, name)(**config).save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", name])
    backbone = load(folder)
    assert backbone.sampling_options["guidance_scale"] == 0
    assert why in caplog.text and "--validation_guidance_scale gives them some" in caplog.text
    backbone.args.validation_guidance_scale = 2
    assert backbone.guidance_scale() == 2
    diffusers.PNDMScheduler().save_pretrained(folder / "scheduler")  # the listed class is the one that loads
    assert bool(Diffusion.load(backbone.args, bounded=False).guided_already()) == (name != "EulerDiscreteScheduler")


def test_a_zero_terminal_snr_is_no_distillation(own):
    folder = own()
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    EulerDiscreteScheduler(**zero_snr).save_pretrained(folder / "scheduler")
    assert load(folder).sampling_options["guidance_scale"] == 7.5
    with pytest.raises(UsageError, match="--validation_guidance_scale is -1"):
        parsed(folder, "--validation_guidance_scale", "-1")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time_cond_proj_dim": 8}, "told the guidance scale.*time_cond_proj_dim is 8"),
        ({"num_class_embeds": 9}, "told a class.*num_class_embeds is 9.*a prompt alone"),
        ({"class_embed_type": "timestep"}, "told a class.*class_embed_type is timestep"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "told an image"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type is text_image"),
        ({"addition_embed_type": "text_time"}, "is a StableDiffusionPipeline, but .*text_time"),
        ({"in_channels": 9}, "in_channels 9 and out_channels 4.*no inpainting"),
        ({"in_channels": 8, "out_channels": 8}, "VAE gives 4 latent_channels.*in_channels 8"),
        ({"_class_name": "UNet2DModel"}, "its unet is a UNet2DModel"),
    ],
)
def test_unets_that_are_told_more_or_see_more(own, tmp_path, changes, message):
    folder = own()
    change(folder / "unet" / "config.json", **changes)
    extra = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    change(folder / "unet" / "config.json", **(extra if "addition_embed_type" in changes else {}))
    shutil.copy(folder / "unet" / "config.json", tmp_path / "student.json")
    for flags in ([], ["--student_config", tmp_path / "student.json"], ["--student_model_name_or_path", folder]):
        with pytest.raises(UsageError, match=f"{TEACHER}.*{message}"):
            check(folder, *flags)


# Another process


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "EDMEulerScheduler"}, "EDM's process"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDM's process"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "consistency"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "variance exploding"),
        ({"_class_name": "IPNDMScheduler"}, "without betas"),
        ({"_class_name": "MyScheduler", "beta_start": 0.1}, "does not have"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous times"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "snr_shift_scale"),
        ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"}, "betas cannot be had"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "samples from noise alone on .*trailing"),
        (
            {"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2]},
            "2 trained_betas for num_train_timesteps 1000",
        ),
    ],
)
def test_processes_that_are_not_ddpms(config, message):
    with pytest.raises(UsageError, match=f"--x: its scheduler.*{message}"):
        ddpm_scheduler(config, "--x")


def test_another_process_is_refused_before_anything_is_read(own):
    folder = own()
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UsageError, match=f"{TEACHER} .*its scheduler is a EDMEulerScheduler, which samples EDM"):
        check(folder)


def test_the_scheduler_is_of_the_class_that_a_pipeline_loads(own):
    """model_index.json decides it, not the `_class_name` in the scheduler's own config."""
    folder = own()
    for listed_class, message in [
        ("FlowMatchEulerDiscreteScheduler", "samples flow matching"),
        (None, "no scheduler"),
    ]:
        change(folder / "model_index.json", scheduler=[listed_class and "diffusers", listed_class])
        with pytest.raises(UsageError, match=f"{TEACHER} .*{message}"):
            check(folder)
    change(folder / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    betas = Diffusion.load(parsed(folder), bounded=False).scheduler.betas
    torch.testing.assert_close(betas, HeunDiscreteScheduler().betas)


def test_the_whole_schedule_is_kept_and_compared(own):
    for scheduler in (HeunDiscreteScheduler(), DDIMScheduler(rescale_betas_zero_snr=True), DDPMScheduler()):
        kind = {"_class_name": type(scheduler).__name__}  # a config that leaves the betas to the class
        config = kind | ({"rescale_betas_zero_snr": True} if isinstance(scheduler, DDIMScheduler) else {})
        torch.testing.assert_close(ddpm_scheduler(config, "--x").alphas_cumprod, scheduler.alphas_cumprod)
    betas = torch.linspace(1e-4, 0.03, 1000).tolist()
    folder = own()
    DDPMScheduler(trained_betas=betas).save_pretrained(folder / "scheduler")
    process = Diffusion.load(parsed(folder), bounded=False)
    for scheduler in (process.scheduler, process.sampler()):
        torch.testing.assert_close(scheduler.alphas_cumprod, (1 - torch.tensor(betas)).cumprod(0))
    (first, *_) = process.differs(DDPMScheduler())
    assert first == "has trained_betas None, the teacher's 0.0001 ... 0.03"
    assert process.differs(DDPMScheduler(beta_end=0.03)) == []  # the same numbers, said otherwise


# The folder


def without_a_layer(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    replace(file, {name: tensor for name, tensor in load_file(file).items() if "layers.1." not in name})


def bert(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=99
    )
    BertModel(config).save_pretrained(folder / "text_encoder")
    change(folder / "model_index.json", text_encoder=["transformers", "BertModel"])


def projected(folder: Path) -> None:
    build_text_encoder(build_tokenizer(), CLIPTextModelWithProjection).save_pretrained(folder / "text_encoder")
    change(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])


def sharded(folder: Path, variant: str | None = None, dtype: torch.dtype = torch.float32) -> None:
    """The text encoder in shards; what else is there stays."""
    encoder = DiffusionPipeline.from_pretrained(folder).text_encoder.to(dtype)
    (folder / "text_encoder" / "model.safetensors").unlink()
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="20KB", variant=variant)


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    max((folder / "text_encoder").glob("model-0000*")).unlink()


def truncated(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()[:-100]
    file.unlink()
    file.write_bytes(content)


def pointer(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 335000000\n")


def fp16_only(part: str):
    def rename(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))

    return rename


def pickled_vae(folder: Path) -> None:
    AutoencoderKL.from_pretrained(folder / "vae").save_pretrained(folder / "vae", safe_serialization=False)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def listed(part: str, *kind):
    return lambda folder: change(folder / "model_index.json", **{part: list(kind)})


def configured(file: str, **changes):
    return lambda folder: change(folder / file, **changes)


def without_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')  # merges.txt is absent too


CHECKER = ("stable_diffusion", "StableDiffusionSafetyChecker")
TOKENIZER, ENCODER, VAE = "tokenizer/tokenizer_config.json", "text_encoder/config.json", "vae/config.json"
BROKEN = {
    "safety checker listed and absent": (
        listed("safety_checker", *CHECKER),
        "lists a safety_checker, .*no such folder",
    ),
    "image processor listed and absent": (
        listed("feature_extractor", "transformers", "CLIPImageProcessor"),
        "no such",
    ),
    "no text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "lists a text_encoder.*no such folder"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "lists a tokenizer.*no such folder"),
    "no vocabulary": (without_vocabulary, "tokenizer is not whole: .* neither tokenizer.json nor merges.txt"),
    "another tokenizer": (listed("tokenizer", "transformers", "BertTokenizer"), "tokenizer is a BertTokenizer"),
    "layers of another size": (configured(ENCODER, intermediate_size=8), r"text_encoder .*is \(64,\), .* \(8,\)"),
    "text encoder left out": (listed("text_encoder", None, None), "lists no text_encoder"),
    "bert": (bert, "text_encoder is a BertModel; .* takes a CLIPTextModel"),
    "projection": (projected, "text_encoder is a CLIPTextModelWithProjection"),
    "remote code": (listed("text_encoder", "my_module", "MyEncoder"), "MyEncoder of my_module, which neither"),
    "tiny vae": (listed("vae", "diffusers", "AutoencoderTiny"), "vae is a AutoencoderTiny; .* takes a AutoencoderKL"),
    "text encoder without a layer": (without_a_layer, "text_encoder lack 16 tensors.*layers.1"),
    "vae without a tensor": (configured(VAE, layers_per_block=2), "vae lack .* tensors of the AutoencoderKL"),
    "shard absent": (without_a_shard, "text_encoder is not whole: .*index.json names .* files, not there: 1, "),
    "truncated": (truncated, "vae, a AutoencoderKL, does not load"),
    "git lfs pointer": (pointer, "vae, a AutoencoderKL, does not load"),
    "vae fp16 only": (fp16_only("vae"), "vae is not whole.*--variant fp16 takes"),
    "text encoder fp16 only": (fp16_only("text_encoder"), "text_encoder is not whole.*--variant fp16 takes"),
    "vae pickled": (pickled_vae, "vae is not whole.*--allow_pickle_weights"),
    "width": (configured(ENCODER, hidden_size=16), "text_encoder"),
    "token length": (configured(TOKENIZER, model_max_length=77), "gives up to 77 tokens .* text_encoder reads 16"),
    "vocabulary": (configured(ENCODER, vocab_size=9), "text_encoder"),
    "latents_mean": (configured(VAE, latents_mean=[0.1] * 4), r"have latents_mean \[0.1"),
    "shift_factor": (configured(VAE, shift_factor=0.1), "have shift_factor 0.1"),
    "no scale": (configured(VAE, scaling_factor=None), "VAE's scaling_factor is None"),
    "a list for an index": (lambda folder: (folder / "model_index.json").write_text("[]"), "no model_index.json"),
    "grey vae": (configured(VAE, in_channels=1), "1 channels in and 3 out"),
}


LATE = {"git lfs pointer", "vae fp16 only", "no tokenizer", "image processor listed and absent", "grey vae"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LATE else n for n in BROKEN])
def test_a_folder_that_is_not_whole_is_refused_before_training(own, name):
    folder = own()
    spoil, message = BROKEN[name]
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        judge(folder)


def test_a_list_for_a_config(own):
    folder = own()
    (folder / "unet" / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="no config of a UNet2DConditionModel"):
        check(folder)


def test_a_dry_run_says_the_same(own, run):
    folder = own()
    without_a_layer(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # the teacher's own weights are not yet read
    flags = [TEACHER, folder, "--train_data_dir", "unread", "--student_preset", "bk_small", "--dry_run"]
    with pytest.raises(UsageError, match="text_encoder lack 16 tensors"):
        run("train_lift", *flags, defaults=False)


def test_parts_that_do_not_fit_each_other(own):
    folder = own("xl")
    tokenizer = build_tokenizer()
    narrow = build_text_encoder(tokenizer, width=16)
    narrow.save_pretrained(folder / "text_encoder")
    with pytest.raises(UsageError, match="text_encoder and text_encoder_2 give 48 numbers a token, its unet reads 64"):
        judge(folder)
    build_text_encoder(tokenizer, width=48).save_pretrained(folder / "text_encoder")
    second = build_text_encoder(tokenizer, CLIPTextModelWithProjection, width=16)
    second.save_pretrained(folder / "text_encoder_2")
    with pytest.raises(UsageError, match="text_encoder_2 gives 16 numbers a prompt .* reads 32 beside six sizes"):
        judge(folder)


def test_the_way_out_that_a_refusal_names(own):
    folder = own()
    pickled_vae(folder)
    assert load(folder, "--allow_pickle_weights").vae().config.latent_channels == 4
    change(folder / "model_index.json", safety_checker=[None, None])
    with pytest.raises(UsageError, match="--variant fp16: .*unet has no weights of it. Leave the flag out"):
        load(folder, "--allow_pickle_weights", "--variant", "fp16")
    fp16_only("unet")(folder)
    with pytest.raises(UsageError, match=f"{TEACHER} .*unet does not load.*--variant fp16 takes"):
        load(folder, "--allow_pickle_weights")
    backbone = load(folder, "--allow_pickle_weights", "--variant", "fp16")  # the other parts have none of it
    assert backbone.conditions.prompts(["a"])["prompt_embeds"].shape == (1, 16, 32)


def test_parts_of_two_variants_are_refused_in_one_sentence(own, tmp_path, monkeypatch):
    """Each flag alone would advise the other; what the sentence says gives a teacher that loads."""
    folder = own()
    fp16_only("text_encoder")(folder)
    with pytest.raises(UsageError, match="text_encoder is not whole: .*--variant fp16 takes"):
        load(folder)
    with pytest.raises(
        UsageError, match="--variant fp16: .*unet has no weights of it, and text_encoder .*no others"
    ) as said:
        load(folder, "--variant", "fp16")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"DiffusionPipeline\S+ \S+\)", str(said.value))[0], {"DiffusionPipeline": DiffusionPipeline})
    load(tmp_path / "other")


def test_another_vae_stands_in_for_one_that_is_absent(own, teachers, tmp_path):
    folder = own()
    shutil.rmtree(folder / "vae")
    listed("vae", "diffusers", "AutoencoderTiny")(folder)
    flag = "--pretrained_vae_model_name_or_path"
    backbone = load(folder, flag, teachers["sd2"] / "vae")
    backbone.save(backbone.teacher, tmp_path / "student")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "student").vae.config.latent_channels == 4
    with pytest.raises(UsageError, match=f"{flag} .* is a whole pipeline. Give the folder of its VAE, .*/vae"):
        check(folder, flag, teachers["sd2"])


# The export


def sharded_fp16(folder: Path) -> None:
    sharded(folder, "fp16", torch.float16)
    fp16_only("vae")(folder)
    fp16_only("unet")(folder)


def sharded_fp16_old_names(folder: Path) -> None:
    sharded_fp16(folder)
    index = folder / "text_encoder" / "model.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    old = {}
    for name in set(content["weight_map"].values()):
        old[name] = name.replace("model.fp16-", "model-").replace(".safetensors", ".fp16.safetensors")
        (index.parent / name).rename(index.parent / old[name])
    change(index, weight_map={tensor: old[name] for tensor, name in content["weight_map"].items()})


def shards_beside_one_fp16_file(folder: Path) -> None:
    encoder = DiffusionPipeline.from_pretrained(folder).text_encoder
    sharded(folder)
    encoder.half().save_pretrained(folder / "text_encoder", variant="fp16")
    fp16_only("unet")(folder)


def half_encoder(folder: Path) -> None:
    DiffusionPipeline.from_pretrained(folder).text_encoder.half().save_pretrained(folder / "text_encoder")


def half_said_in_the_config(folder: Path) -> None:
    change(folder / "text_encoder" / "config.json", dtype="float16")


def half_and_unsaid(folder: Path) -> None:
    half_encoder(folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    del config["dtype"]
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))


def old_processor(folder: Path) -> None:
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    listed("feature_extractor", "transformers", "CLIPFeatureExtractor")(folder)
    assert not hasattr(transformers, "CLIPFeatureExtractor")


EXPORTS = {
    "shards": (sharded, []),
    "sharded variant": (sharded_fp16, ["--variant", "fp16"]),
    "sharded variant, old names": (sharded_fp16_old_names, ["--variant", "fp16"]),
    "shards beside one fp16 file": (shards_beside_one_fp16_file, ["--variant", "fp16"]),
    "encoder in half": (half_encoder, []),
    "encoder in half by its config": (half_said_in_the_config, []),
    "encoder in half, unsaid": (half_and_unsaid, []),
    "pickled vae": (pickled_vae, ["--allow_pickle_weights"]),
    "image processor of an old name": (old_processor, []),
}


QUICK = ("sharded variant, old names", "encoder in half, unsaid")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPORTS]


@pytest.mark.parametrize("name", ALL)
def test_an_export_loads_and_draws_with_a_plain_from_pretrained(own, tmp_path, name):
    folder = own()
    spoil, flags = EXPORTS[name]
    spoil(folder)
    backbone = load(folder, *flags)
    backbone.save(backbone.teacher, tmp_path / "student")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    dtypes = {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()}
    assert dtypes == {torch.float32}
    assert pipeline("a b", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
    ours, theirs = pipeline.text_encoder, backbone.conditions.encoders[0]()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "dtypes", [(torch.float16,), (torch.bfloat16,), (torch.float32,), (torch.float16, torch.float32)]
)
def test_a_teacher_loads_in_the_dtype_of_its_files(own, dtypes):
    """So that processes share what is mapped of them; its student starts from their values, in float32."""
    folder = own()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(load_file(file).items())}
    replace(file, stored)
    backbone = load(folder)
    assert {p.dtype for p in backbone.teacher.parameters()} == {dtypes[0] if len(dtypes) == 1 else torch.float32}
    student, _ = backbone.make_student(backbone.args, {})
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    name = "conv_in.weight"
    assert torch.equal(student.state_dict()[name], stored[name].float())


def test_an_export_that_does_not_load_back_is_said(own, tmp_path):
    backbone = load(own())
    backbone.save(backbone.teacher, tmp_path / "student")
    look = (tmp_path / "student", StableDiffusionPipeline, "unet", backbone.teacher)
    load_back(*look)
    with pytest.raises(RuntimeError, match="the tensors of its unet are others"):
        load_back(*look[:3], UNet2DConditionModel.from_config(backbone.teacher.config))
    change(tmp_path / "student" / "text_encoder" / "config.json", dtype="float16")
    with pytest.raises(RuntimeError, match="own weights to .*unet, but .* its text_encoder loads in torch.float16"):
        load_back(*look)
    (tmp_path / "student" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="does not load back as a pipeline: .*text_encoder"):
        load_back(*look)


# Messages


def test_koala_counts_the_layers_on_the_way_up():
    """As SSD-1B has them: at most 4 on the way down, 10 on the way up."""
    teacher = {
        "block_out_channels": (8, 8, 8, 8),
        "transformer_layers_per_block": [[1, 1], [2, 2], [4, 4], [1, 1]],
        "reverse_transformer_layers_per_block": [[1] * 3, [4, 4, 10], [2, 1, 1], [1] * 3],
    }
    assert "koala_700m" in presets_for(teacher)
    assert student_config(teacher, "koala_700m")["reverse_transformer_layers_per_block"][1] == [4, 5]
    teacher["reverse_transformer_layers_per_block"] = [[1] * 3, [3] * 3, [2, 1, 1], [1] * 3]
    with pytest.raises(UsageError, match="koala_700m .*at most 4.*--student_config"):
        student_config(teacher, "koala_700m")


def test_one_file_is_no_pipeline(tmp_path):
    (tmp_path / "sd.safetensors").touch()
    with pytest.raises(UsageError, match=f"{TEACHER} .* is one file, not a pipeline's folder .diffusers' from_single"):
        check(tmp_path / "sd.safetensors")
