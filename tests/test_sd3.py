# SPDX-License-Identifier: Apache-2.0
"""What Stable Diffusion 3 has of its own: three text encoders or two, depth students; the rest: test_contract.py."""

import json
import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import run_script
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from latent_pipelines import SD3 as TINY
from latent_pipelines import save_captioned, save_sd3
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import analyze_error
import evaluate_fid
import train_place
from utils.backbones import choose_backbone
from utils.backbones.sd3 import SD3
from utils.command_line import UsageError, call
from utils.data.cache import CachedRows, check_cache
from utils.data.cache_key import cache_settings
from utils.distillation.features import Tapped, tap_pair
from utils.evaluation.pipelines import load_pipeline
from utils.pixels import to_uint8
from utils.randomness import StepRandom
from utils.students.depth import KEPT
from utils.training.arguments import parse_args

WITHOUT = {"text_encoder_3": None, "tokenizer_3": None}
BRIEFLY = (
    "--max_train_steps 2 --train_batch_size 4 --logging_steps 1 --validation_shown_samples 0 --report_to none "
    "--num_cpu_threads 1"
).split()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd3")
    return {"t5": save_sd3(folder / "t5"), "none": save_sd3(folder / "none", t5=False)}


@pytest.fixture(scope="module")
def stock(teachers) -> dict[str, StableDiffusion3Pipeline]:
    load = StableDiffusion3Pipeline.from_pretrained
    pipelines = {"t5": load(teachers["t5"]), "none": load(teachers["none"], **WITHOUT)}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return save_captioned(tmp_path_factory.mktemp("pictures") / "images")


def parsed(teacher: Path, *flags) -> Namespace:
    student = [] if any("student" in str(flag) or "kept" in str(flag) for flag in flags) else ["--student_depth", "2"]
    given = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", "unused", *student, *flags]
    return parse_args("", train_place.add_method_arguments, [str(word) for word in given])


def load(teacher: Path, *flags) -> SD3:
    args = parsed(teacher, *flags)
    return choose_backbone(args).load(args)


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Prompts


@pytest.mark.parametrize("kind, length", [("t5", 5), ("none", None), slowly("t5", None), slowly("none", 5)])
def test_prompts_are_those_of_the_stock_pipeline(teachers, stock, kind, length):
    """Given, empty and longer than T5 may read; without T5 with as many zeros, of which a cache holds none."""
    backbone = load(teachers[kind], *(["--max_sequence_length", length] if length else []))
    conditions, prompts = backbone.conditions, ["a b", "", "z y x w v u t s r q"]
    told = {} if length is None else {"max_sequence_length": length}
    with torch.no_grad():
        expected = stock[kind].encode_prompt(prompts, None, None, device="cpu", **told)
    found = conditions.pipeline_arguments(prompts)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], tensor, msg=name)
    assert found["prompt_embeds"].shape == (3, 16 + (length or 256), 80)
    assert found["prompt_embeds"][:, 16:].any() == (kind == "t5")
    kept = conditions.prompts(["a b"])
    assert {name: value.shape[1:] for name, value in kept.items()} == {
        "clip": (16, 64),
        "pooled": (64,),
        **({"t5": (length or 256, 80)} if kind == "t5" else {}),
    }
    ours, example = backbone.example(), conditions.keywords(kept, {})
    assert all(ours[name].shape == value.shape for name, value in example.items())
    more = {"max_sequence_length": str(length)} if length else {}
    assert conditions.call("a cat") == {"prompt": '"a cat"', **more}


@pytest.mark.parametrize("kind", [slowly("t5"), "none"])
def test_samples_are_those_of_the_stock_pipeline(teachers, stock, kind):
    """With guidance, from the same noise; its own dtype aside."""
    backbone, prompts = load(teachers[kind]), ["a b", "c"]
    found = backbone.sample(backbone.teacher, [1, 2], 3, prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = stock[kind](prompts, generator=generators, num_inference_steps=3, output_type="np").images
    assert (found.int() - to_uint8(images).int()).abs().max() <= 1
    other = load(teachers[kind], "--validation_guidance_scale", "0").sample(backbone.teacher, [1, 2], 3, prompts)
    assert not torch.equal(found, other)


@pytest.mark.parametrize(
    "made, read, found",
    [
        (("t5",), ("none",), "text_encoder_3 was .*, is None"),
        (("none",), ("t5",), "text_encoder_3 was None, is "),
        (("t5",), ("t5", "--max_sequence_length", "77"), "max_sequence_length was 256, is 77"),
    ],
)
def test_a_cache_of_other_prompts_is_refused(teachers, tmp_path, made, read, found):
    accelerator, cache = Namespace(mixed_precision="no"), ["--latent_cache_dir", tmp_path]
    backbone = load(teachers[made[0]], *made[1:], *cache)
    content = cache_settings(backbone.args, accelerator, None, backbone)
    (tmp_path / "cache.json").write_text(json.dumps({**content, "complete": True}))
    check_cache(backbone.args, accelerator, None, backbone)
    other = load(teachers[read[0]], *read[1:], *cache)
    with pytest.raises(UsageError, match=f"was made with other settings: .*{found}"):
        check_cache(other.args, accelerator, None, other)


# The transformer


def test_the_time_is_told_in_float32(teachers):
    """In bfloat16 999 would be 1000, and what little noise there is at the clean end another."""
    backbone, seen = load(teachers["none"], "--weighting_scheme", "none"), []
    model = Tapped(backbone.teacher.bfloat16())
    backbone.teacher.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = {"pixels": pixels} | {f"input_ids_{i}": torch.ones(4, 16, dtype=torch.long) for i in range(2)}
    rng = StepRandom(0, 0)
    clean, condition = backbone.encode(batch, rng)
    noised = backbone.add_noise(clean, rng)
    output = backbone.predict(model, noised, condition).output
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], noised.time)
    assert output.dtype == torch.float32 and output.shape == clean.shape
    assert not torch.equal(noised.time, noised.time.bfloat16().float())
    sampler = backbone.process.sampler()
    sampler.set_timesteps(3)
    backbone.sample(backbone.teacher, [0], 3, ["a b"])
    told = torch.stack([time[0] for time in seen[1:]])
    assert torch.equal(told, sampler.timesteps) and not torch.equal(told, told.bfloat16().float())


def test_latents_are_shifted_and_scaled(teachers, stock):
    backbone = load(teachers["none"])
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    posterior = stock["none"].vae.encode(pixels / 127.5 - 1).latent_dist
    latents = posterior.mean + posterior.std * StepRandom(0, 1).normal(posterior.mean.shape)
    batch = {"pixels": pixels} | {f"input_ids_{i}": torch.ones(2, 16, dtype=torch.long) for i in range(2)}
    clean, _ = backbone.encode(batch, StepRandom(0, 1))
    torch.testing.assert_close(clean, (latents - 0.1) * 0.5)


@pytest.mark.parametrize("flags, kept", [("--student_depth 4", [0, 1, 2, 3]), ("--kept_layers 1,3", [1, 3])])
def test_the_flags_say_which_layers_are_kept(teachers, flags, kept):
    backbone = load(teachers["none"], *flags.split())
    student, _ = backbone.make_student(backbone.args, {})
    assert student.config[KEPT] == kept
    assert list(student.config.dual_attention_layers) == [new for new, old in enumerate(kept) if old in (0, 1)]
    last = student.transformer_blocks[-1]
    assert last.context_pre_only and last.attn2 is None
    if len(kept) == 4:  # a student of all layers is its teacher
        for read in (lambda model: model.state_dict(), lambda model: dict(model.named_buffers())):
            ours, theirs = read(student), read(backbone.teacher)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_scoring_encoded_is_encoded_anew(teachers, tmp_path):
    """The teacher's files are of another dtype than the training, which the key of a cache names."""
    StableDiffusion3Pipeline.from_pretrained(teachers["none"], **WITHOUT).to(torch.float16).save_pretrained(tmp_path)
    backbone = load(tmp_path, "--student_depth", "2", "--layer_choice", "scored")
    ids = {f"input_ids_{i}": torch.ones(2, 16, dtype=torch.long) for i in range(2)}
    batch = {"pixels": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)} | ids
    backbone.make_student(backbone.args, batch)
    backbone.teacher.float()
    rows = backbone.cache_rows(batch) | {f"empty_{name}": value for name, value in backbone.conditions.empty().items()}
    assert {value.dtype for value in rows.values()} == {torch.float32}


def test_scored_layers_keep_the_last(teachers):
    backbone = load(teachers["none"], "--student_depth", "2", "--layer_choice", "scored")
    with torch.no_grad():  # the last layer does next to nothing, and stays
        for parameter in backbone.teacher.transformer_blocks[3].norm1.linear.parameters():
            parameter.mul_(1e-3)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = {"pixels": pixels} | {f"input_ids_{i}": torch.ones(2, 16, dtype=torch.long) for i in range(2)}
    student, table = backbone.make_student(backbone.args, batch)
    assert student.config[KEPT][-1] == 3 and len(student.config[KEPT]) == 2
    scores = [float(score) for score in re.findall(r"layer \d\s+score (\S+)", table)]
    assert min(scores) == scores[3]


def test_taps_are_of_the_image_and_projectors_linear(teachers, tmp_path):
    backbone = load(teachers["none"], "--lambda_kd_feat", "1")
    narrow = TINY | {"num_attention_heads": 1, "caption_projection_dim": 8, "num_layers": 2}
    student = SD3Transformer2DModel(**narrow)
    pairs = backbone.feature_pairs(student)
    assert [pair[1] for pair in pairs] == ["transformer_blocks.0", "transformer_blocks.3"]
    tapped, teacher = tap_pair(student, backbone.teacher, pairs, backbone.example(), seed=0)
    assert [type(layer) for layer in tapped.projectors] == [nn.Linear, nn.Linear]
    (_, ours), (_, theirs) = tapped(**backbone.example()), teacher(**backbone.example())
    assert [each.shape for each in ours] == [each.shape for each in theirs] == [(1, 64, 16)] * 2


# What is refused


def changed(path: str, **values):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(config | values))

    return spoil


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "text_encoder_3" / "model.safetensors")
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, folder / "text_encoder_3" / "model.safetensors", metadata={"format": "pt"})


def without_a_vocabulary(folder: Path) -> None:
    (folder / "tokenizer_3" / "tokenizer.json").unlink()


NONE = [None, None]
SPOILT = {
    "T5 without its tokenizer": (changed("model_index.json", tokenizer_3=NONE), "lists no tokenizer_3"),
    "a tokenizer without T5": (changed("model_index.json", text_encoder_3=NONE), None),
    "no second encoder": (changed("model_index.json", text_encoder_2=NONE), "lists no text_encoder_2"),
    "a tensor of T5": (without_a_tensor, "its text_encoder_3 lack 1 tensors"),
    "T5's vocabulary": (without_a_vocabulary, "its tokenizer_3 is not whole"),
    "T5 of another width": (changed("text_encoder_3/config.json", d_model=64), "text_encoder_3"),
    "T5 of fewer words": (changed("text_encoder_3/config.json", vocab_size=20), "text_encoder_3"),
    "CLIP of another width": (changed("text_encoder/config.json", projection_dim=16), "text_encoder"),
    "tokenizers of two lengths": (
        changed("tokenizer_2/tokenizer_config.json", model_max_length=8),
        "different numbers",
    ),
    "another transformer": (changed("transformer/config.json", pooled_projection_dim=32), "64 numbers a prompt"),
    "a VAE without a shift": (changed("vae/config.json", shift_factor=None), "shift_factor is None, .* Write 0.0"),
    "nothing, as positions are computed": (changed("transformer/config.json", pos_embed_max_size=None), None),
    "a VAE with means": (changed("vae/config.json", latents_mean=[0.1] * 4), "latents_mean"),
    "an editing model": (changed("transformer/config.json", in_channels=8), "in_channels 8 and out_channels 4"),
    "nothing, as the channels out are those in": (changed("transformer/config.json", out_channels=None), None),
    "another process": (
        lambda folder: DDPMScheduler().save_pretrained(folder / "scheduler"),
        "its scheduler is a DDPMScheduler",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_whole_or_does_not_fit_is_refused(teachers, tmp_path, name):
    shutil.copytree(teachers["t5"], tmp_path / "own")
    spoil, message = SPOILT[name]
    spoil(tmp_path / "own")
    args = parsed(tmp_path / "own")
    if message is None:
        SD3.check(args)
        return
    with pytest.raises(UsageError, match=f"--pretrained_model_name_or_path.*{message}"):
        SD3.check(args)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--kept_layers 0,2", "--kept_layers: the last layer kept is 2; it must be 3"),
        ("--student_depth 5", "--student_depth: 5 layers to be kept, of 4"),
        ("--resolution 64", "--resolution 64: the table of positions ends at 48 pixels"),
        ("--student_config small.json", "--resolution 32: the table of positions ends at 16 pixels"),
        ("--resolution 30", "--resolution 30: .* must be a multiple of 4"),
        ("--max_sequence_length 600", "--max_sequence_length 600: the stock pipeline takes up to 512"),
        ("--dropout 0.1", "--dropout 0.1: a SD3Transformer2DModel has none"),
        ("--snr_gamma 5", "--snr_gamma 5.0 does not go with a SD3.*--weighting_scheme"),
        ("--antithetic_timesteps", "--antithetic_timesteps True does not go with"),
    ],
)
def test_flags_that_do_not_fit_are_refused(teachers, tmp_path, monkeypatch, flags, message):
    config = json.loads((teachers["none"] / "transformer" / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps(config | {"pos_embed_max_size": 4}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        SD3.check(parsed(teachers["none"], *flags.split()))


def test_a_pipeline_may_not_even_list_t5(teachers, tmp_path):
    folder = shutil.copytree(teachers["none"], tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({name: part for name, part in index.items() if not name.endswith("_3")})
    )
    SD3.check(parsed(folder))
    pipeline = load_pipeline(folder, "--x", dtype=torch.float32, device="cpu")
    assert pipeline.text_encoder_3 is None and pipeline.tokenizer_3 is None


def test_teacher_and_student_are_of_one_shift(teachers, tmp_path):
    shutil.copytree(teachers["none"], tmp_path / "student")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(tmp_path / "student" / "scheduler")
    with pytest.raises(
        UsageError, match="--student_model_name_or_path .*: its scheduler has shift 1, the teacher's 3"
    ):
        SD3.check(parsed(teachers["none"], "--student_model_name_or_path", tmp_path / "student"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mode_scale 2", r"--mode_scale is 2.0; it must lie in \[-1, 1.75\]"),
        ("--logit_std 0", "--logit_std is 0.0; it must be above 0"),
        ("--max_sequence_length 0", "--max_sequence_length is 0; it must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parsed(Path("teacher"), *flags.split())


# Whole runs


def train(folder: Path, teacher: Path, pictures: Path, *flags, output: str = "student") -> Path:
    given = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", pictures, *BRIEFLY, *flags]
    return run_script(folder, "", "", "train_place", *given, output=output, defaults=False)


def test_a_cache_gives_prompts_as_t5_read_them(teachers, tmp_path):
    """CLIP's tokens end long before."""
    prompt = " ".join("abcdefghijklmnopqrstuvwxyz")
    flags = ["--student_depth", "2", "--latent_cache_dir", tmp_path / "cache"]
    train(tmp_path, teachers["t5"], save_captioned(tmp_path / "images", 4, [prompt]), *flags)
    assert CachedRows(tmp_path / "cache", load(teachers["t5"])).captions(1) == [prompt]


def test_a_student_without_t5_loads_as_it_is_said(teachers, pictures, tmp_path, capsys, monkeypatch):
    """As the card says, and as the line that is printed at the end."""
    flags = ["--student_depth", "2", "--max_sequence_length", "6", "--validation_shown_samples", "1"]
    folder = train(tmp_path, teachers["none"], pictures, *flags, "--validation_num_inference_steps", "2")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["image"].size == (32, 32)
    command = capsys.readouterr().out.partition("Next: a picture")[2].splitlines()[1]
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(command)[2], {})
    assert Image.open("sample.png").size == (32, 32)
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"] == NONE
    assert not (folder / "text_encoder_3").exists()


@pytest.mark.slow
def test_lora_is_what_the_stock_pipeline_loads(teachers, pictures, tmp_path):
    flags = ["--student_depth", "4", "--lora_rank", "2", "--learning_rate", "1e-2", "--max_train_steps", "3"]
    folder = train(tmp_path, teachers["none"], pictures, *flags)
    fused = train(tmp_path, teachers["none"], pictures, *flags, "--fuse_lora", output="fused")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **WITHOUT)
    weights = load_file(teachers["none"] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in pipeline.transformer.state_dict().items())
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    names = {name for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name}
    assert any("attn.add_q_proj" in name for name in names) and any("attn2.to_q" in name for name in names)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs = load_file(fused / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = 0
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(weights[name], theirs[name])
    assert moved > 10
    args = parsed(teachers["none"], "--student_model_name_or_path", folder)
    again, _ = choose_backbone(args).load(args).make_student(args, {})
    torch.testing.assert_close(dict(again.state_dict()), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_teacher_of_half_files_alone(teachers, pictures, tmp_path):
    """As the Hub has them: T5 in shards, all of the variant; the student loads with nothing said."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(teachers["t5"]).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    shutil.rmtree(tmp_path / "half" / "text_encoder_3")
    pipeline.text_encoder_3.save_pretrained(
        tmp_path / "half" / "text_encoder_3", variant="fp16", max_shard_size="20KB"
    )
    assert len([*(tmp_path / "half" / "text_encoder_3").glob("*fp16*.safetensors")]) > 1
    flags = ["--student_depth", "2", "--latent_cache_dir", tmp_path / "cache", "--variant", "fp16"]
    folder = train(tmp_path, tmp_path / "half", pictures, *flags)
    student = StableDiffusion3Pipeline.from_pretrained(folder)
    assert {part.dtype for part in student.components.values() if isinstance(part, nn.Module)} == {torch.float32}
    assert student("a b", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "none"])
def test_it_is_analysed_and_evaluated(teachers, pictures, tmp_path, kind):
    folder = train(tmp_path, teachers[kind], pictures, "--student_depth", "2")
    data = ["--train_data_dir", pictures, "--num_images", "4", "--num_timesteps", "3", "--num_inference_steps", "2"]
    given = ["--pretrained_model_name_or_path", teachers[kind], "--student_model_name_or_path", folder, *data]
    for probe in ("student_input", "teacher_trajectory"):
        flags = ["--shown_samples", "2", "--batch_size", "2", "--probe", probe, "--output_dir", tmp_path / probe]
        call(analyze_error, [str(word) for word in (*given, *flags)])
        analysis = json.loads((tmp_path / probe / "analysis.json").read_text())
        assert analysis["protocol"]["sampler"]["name"] == "Euler, shift 3"
        assert analysis["protocol"]["place_name"] == "place" and analysis["places"][1]["place"] == 500
        gaps = analysis["samples"]["pixel_difference_to_teacher"]
        assert gaps["teacher"] == 0 < gaps["student"]
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    flags = ["--pretrained_model_name_or_path", folder, "--prompts", tmp_path / "prompts.txt", "--num_samples", "8"]
    flags += [
        "--max_sequence_length",
        "77",
        "--batch_size",
        "4",
        "--num_inference_steps",
        "2",
        "--output_dir",
        tmp_path / "evaluated",
    ]
    flags += ["--feature_extractor", "assets/classifier", "--reference_images", pictures, "--num_cpu_threads", "1"]
    call(evaluate_fid, [str(word) for word in flags])
    protocol = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())["protocol"]
    assert protocol["samples"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert protocol["samples"]["max_sequence_length"] == 77
