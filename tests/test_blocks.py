# SPDX-License-Identifier: Apache-2.0
"""Block students of Stable Diffusion U-Nets: the papers' sizes, the right tensors, the teacher's function."""

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.published import SD14, SD21, SD21_BASE, SDXL
from utils.distillation.features import Tapped
from utils.students.blocks import (
    PRESETS,
    feature_pairs,
    make_block_student,
    presets_for,
    student_config,
)
from utils.students.sizes import example_inputs, model_size

TINY = {"sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 16}
TINY_SD1 = SD14 | TINY | {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 4}
TINY_SD2 = SD21_BASE | TINY | {"block_out_channels": [16, 32, 32, 32], "attention_head_dim": [2, 4, 8, 8]}
TINY_XL = (
    SDXL
    | TINY
    | {
        "block_out_channels": [16, 32, 32],
        "attention_head_dim": [2, 2, 4],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "transformer_layers_per_block": [1, 2, 7],
    }
)
ASYMMETRIC_XL = TINY_XL | {  # as SSD-1B: a number for each attention
    "transformer_layers_per_block": [[1, 1], [3, 2], [7, 6]],
    "reverse_transformer_layers_per_block": [[7, 3, 8], [2, 1, 4], [1, 1, 1]],
}
CASES = {
    "SD 1, base": (TINY_SD1, "bk_base"),
    "SD 1, small": (TINY_SD1, "bk_small"),
    "SD 1, tiny": (TINY_SD1, "bk_tiny"),
    "SD 2, base": (TINY_SD2, "bk_base"),
    "SD 2, small": (TINY_SD2, "bk_small"),
    "SD 2, tiny": (TINY_SD2, "bk_tiny"),
    "three layers": (TINY_SD2 | {"layers_per_block": 3}, "bk_small"),
    "layers by stage": (TINY_SD1 | {"layers_per_block": [1, 2, 3, 2]}, "bk_tiny"),
    "XL, base": (TINY_XL, "bk_base"),
    "XL, small": (TINY_XL, "bk_small"),
    "XL, 1b": (TINY_XL, "koala_1b"),
    "XL, 700m": (TINY_XL, "koala_700m"),
    "XL reversed, 700m": (TINY_XL | {"reverse_transformer_layers_per_block": [9, 3, 1]}, "koala_700m"),
    "XL asymmetric, 1b": (ASYMMETRIC_XL, "koala_1b"),
    "XL asymmetric, small": (ASYMMETRIC_XL, "bk_small"),
}
cases = pytest.mark.parametrize(("config", "preset"), CASES.values(), ids=CASES)


def lively(config, seed=0):
    """A teacher in eval mode with random gains, biases and deep layers that reach the output."""
    model = UNet2DConditionModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4.0
        parameter.data = noise / math.sqrt(fan_in) + ("norm" in name and name.endswith("weight"))
    return model.requires_grad_(False)


def inputs(model, seed=0):
    """Two random samples of everything the model takes."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value):
        if isinstance(value, dict):
            return {name: fill(part) for name, part in value.items()}
        return value if value is None else torch.randn((2, *value.shape[1:]), generator=generator)

    return fill(example_inputs(model)) | {"timestep": torch.tensor([3, 700])}


def output(model, seed=0):
    with torch.no_grad():
        return model.eval()(**inputs(model, seed)).sample


def parameter_count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet2DConditionModel.from_config(config).parameters())


@pytest.mark.parametrize(
    ("config", "teacher", "students"),
    [  # millions: BK-SDM's paper, KOALA's, and for bk_* on SDXL what diffusers counts
        (SD14, 859.52, {"bk_base": 579.38, "bk_small": 482.35, "bk_tiny": 323.38}),
        (SD21_BASE, 865.91, {"bk_base": 583.48, "bk_small": 485.79, "bk_tiny": 326.83}),
        (SD21, 865.91, {"bk_base": 583.48, "bk_small": 485.79, "bk_tiny": 326.83}),
        (SDXL, 2567.46, {"bk_base": 1717.28, "bk_small": 1304.16, "koala_1b": 1161.18, "koala_700m": 782.82}),
    ],
    ids=["SD 1.4", "SD 2.1-base", "SD 2.1", "SDXL"],
)
def test_the_presets_have_the_papers_sizes(config, teacher, students):
    assert round(parameter_count(config) / 1e6, 2) == teacher
    assert presets_for(config) == list(students)
    for preset, millions in students.items():
        student = student_config(config, preset)
        assert round(parameter_count(student) / 1e6, 2) == millions, preset
        assert student["sample_size"] == config["sample_size"]
        assert student.get("upcast_attention") == config.get("upcast_attention", False)
    assert config["layers_per_block"] == 2  # the teacher's own config is not touched


@pytest.mark.slow
def test_multiply_adds_are_those_of_the_layers():
    """Against a count by hand: convolutions, linear layers, and the two products of attention."""
    for config in (TINY_SD1, TINY_XL | {"transformer_layers_per_block": [1, 1, 2]}):
        model, counted = UNet2DConditionModel.from_config(config), []

        def count(module, arguments, keywords, result, counted=counted):
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                counted.append(result.numel() * module.weight[0].numel())
            elif isinstance(module, Attention):
                keys = keywords.get("encoder_hidden_states")
                keys = arguments[0] if keys is None else keys
                counted.append(2 * arguments[0].shape[1] * keys.shape[1] * module.inner_dim)

        for module in model.modules():
            module.register_forward_hook(count, with_kwargs=True)
        example = example_inputs(model)
        assert example["encoder_hidden_states"].shape == (1, 77, 16)  # CLIP's padded prompt
        model(**example)
        size = model_size(config)
        assert size.macs == sum(counted)
        assert size.parameters == sum(p.numel() for p in model.parameters())
        assert model_size(model.config, UNet2DConditionModel) == size
    assert model_size(TINY_SD1 | {"sample_size": None}).macs is None
    assert model_size(TINY_SD1 | {"num_class_embeds": 10}).parameters == model_size(TINY_SD1).parameters + 10 * 128


# what comes from elsewhere than the same name, written out; three-layer teachers replace the 2 by a 3
LAST = {f"up_blocks.{i}.{kind}.1": f"up_blocks.{i}.{kind}.2" for i in range(4) for kind in ("resnets", "attentions")}
SHIFTED = {
    "up_blocks.0.resnets.0": "up_blocks.1.resnets.0",
    "up_blocks.0.resnets.1": "up_blocks.1.resnets.2",
    "up_blocks.0.attentions.0": "up_blocks.1.attentions.0",
    "up_blocks.0.attentions.1": "up_blocks.1.attentions.2",
    "up_blocks.0.upsamplers.0": "up_blocks.1.upsamplers.0",
    "up_blocks.1.resnets.0": "up_blocks.2.resnets.0",
    "up_blocks.1.resnets.1": "up_blocks.2.resnets.2",
    "up_blocks.1.attentions.0": "up_blocks.2.attentions.0",
    "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
    "up_blocks.1.upsamplers.0": "up_blocks.2.upsamplers.0",
    "up_blocks.2.resnets.0": "up_blocks.3.resnets.0",
    "up_blocks.2.resnets.1": "up_blocks.3.resnets.2",
    "up_blocks.2.attentions.0": "up_blocks.3.attentions.0",
    "up_blocks.2.attentions.1": "up_blocks.3.attentions.2",
}


@cases
def test_every_tensor_is_the_right_one_of_the_teacher(config, preset):
    teacher = lively(config)
    before = copy.deepcopy(teacher.state_dict())
    ambient = torch.get_rng_state()
    student, report = make_block_student(teacher, preset, seed=0)
    assert torch.equal(torch.get_rng_state(), ambient)
    moved = SHIFTED if preset == "bk_tiny" else LAST
    theirs, last = teacher.state_dict(), len(teacher.up_blocks[0].resnets) - 1
    if isinstance(config["layers_per_block"], list):  # up blocks of 3, 4, 3, 2 layers; up block 0 is dropped
        moved = SHIFTED | {
            "up_blocks.0.resnets.1": "up_blocks.1.resnets.3",
            "up_blocks.0.attentions.1": "up_blocks.1.attentions.3",
            "up_blocks.2.resnets.1": "up_blocks.3.resnets.1",
            "up_blocks.2.attentions.1": "up_blocks.3.attentions.1",
        }
    elif last != 2:
        moved = {name: source[:-1] + str(last) for name, source in moved.items()}
    for name, tensor in student.state_dict().items():
        layer = ".".join(name.split(".")[:4])
        source = moved[layer] + name[len(layer) :] if layer in moved else name
        assert torch.equal(tensor, theirs[source]), (name, source)
        assert report.sources[name] == source
    assert report.fresh == report.fresh_modules == ()
    assert student.training and student.dtype == torch.float32 and student.device.type == "cpu"
    assert all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in before.items()) and not teacher.training
    assert (student.mid_block is None) == (preset in ("bk_small", "bk_tiny", "koala_700m"))
    assert all(len(block.resnets) == 1 for block in student.down_blocks)
    assert all(len(block.resnets) == 2 for block in student.up_blocks)


def silence_resnet(resnet):
    """Make it the identity on the first of the streams concatenated in its input."""
    for parameter in resnet.conv2.parameters():
        parameter.zero_()
    if resnet.conv_shortcut is not None:
        resnet.conv_shortcut.bias.zero_()
        torch.nn.init.zeros_(resnet.conv_shortcut.weight)
        resnet.conv_shortcut.weight[:, : resnet.out_channels, 0, 0] = torch.eye(resnet.out_channels)


def silence(*layers):
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


@torch.no_grad()
def without(teacher, preset):
    """The teacher with everything the preset drops made the identity, in place."""
    for block in teacher.down_blocks:
        for resnet in block.resnets[1:]:
            silence_resnet(resnet)
        for attention in list(getattr(block, "attentions", []))[1:]:
            silence(attention.proj_out)
    for block in teacher.up_blocks:
        for resnet in block.resnets[1:-1]:
            silence_resnet(resnet)
        for attention in list(getattr(block, "attentions", []))[1:-1]:
            silence(attention.proj_out)
    if preset in ("bk_small", "bk_tiny", "koala_700m"):
        for resnet in teacher.mid_block.resnets:
            silence_resnet(resnet)
        silence(teacher.mid_block.attentions[0].proj_out)
    if preset == "bk_tiny":  # the stage below cannot be an identity: let nothing read what comes up from it
        first = teacher.up_blocks[1].resnets[0]
        for conv in (first.conv1, first.conv_shortcut):
            conv.weight[:, : first.out_channels] = 0
    kept = {"koala_1b": 6, "koala_700m": 5}.get(preset, 100)
    for attention in teacher.modules():
        for block in list(getattr(attention, "transformer_blocks", []))[kept:]:
            silence(block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[-1])
    return teacher


@cases
def test_what_is_kept_computes_as_in_the_teacher(config, preset):
    teacher = lively(config)
    whole = output(teacher)
    student, _ = make_block_student(without(teacher, preset), preset, seed=0)
    expected = output(teacher)
    assert expected.std() > 0.1
    assert (expected - whole).abs().max() > 0.05  # what is dropped did matter
    torch.testing.assert_close(output(student), expected, rtol=1e-5, atol=1e-5)


def test_stock_diffusers_loads_and_samples_the_student(tmp_path):
    for config, preset in (CASES["SD 1, base"], CASES["SD 2, tiny"], CASES["XL asymmetric, 1b"]):
        student, _ = make_block_student(lively(config), preset, seed=0)
        student.save_pretrained(tmp_path / preset)
        loaded, info = UNet2DConditionModel.from_pretrained(tmp_path / preset, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(output(loaded), output(student))
        again = student_config(config, preset)
        assert {name: loaded.config[name] for name in again if name != "_class_name"} == {
            name: value for name, value in student.config.items() if not name.startswith("_")
        }


@pytest.mark.parametrize("preset", ["bk_base", "bk_small", "bk_tiny"])
def test_the_stock_pipeline_samples_with_every_preset(tmp_path, preset):
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=16),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=make_block_student(lively(TINY_SD1), preset, seed=0)[0],
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path)
    images = []
    for each in (pipeline, StableDiffusionPipeline.from_pretrained(tmp_path)):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        result = each("a cat", num_inference_steps=2, generator=generator, output_type="pt")
        images.append(result.images)
    assert (pipeline.unet.mid_block is None) == (preset != "bk_base")
    assert images[0].shape == (1, 3, 16, 16) and images[0].std() > 0.01
    assert torch.equal(*images)


DOWN3, DOWN4 = ([(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(n)] for n in (3, 4))
UP3, UP4 = ([(f"up_blocks.{i}", f"up_blocks.{i}") for i in range(n)] for n in (3, 4))
MID = [("mid_block", "mid_block")]
TINY_PAIRS = [
    *DOWN3[:2],
    ("down_blocks.2", "down_blocks.2.attentions.1"),
    ("up_blocks.0", "up_blocks.1"),
    ("up_blocks.1", "up_blocks.2"),
    ("up_blocks.2", "up_blocks.3"),
]


def features(student, teacher, pairs):
    """The outputs of the paired blocks, of the same inputs."""
    example = inputs(teacher)
    example["x_t"] = example.pop("sample")
    with torch.no_grad():
        return [
            Tapped(model.eval(), names)(**example)[1]
            for model, names in zip((student, teacher), zip(*pairs, strict=True), strict=True)
        ]


@pytest.mark.parametrize(
    ("config", "preset", "expected"),
    [
        (TINY_SD1, "bk_base", DOWN4 + MID + UP4),
        (TINY_SD2, "bk_small", DOWN4 + UP4),
        (TINY_SD2, "bk_tiny", TINY_PAIRS),
        (TINY_XL, "koala_1b", DOWN3 + MID + UP3),
        (TINY_XL, "koala_700m", DOWN3 + UP3),
    ],
)
def test_paired_blocks_have_the_same_shape_and_in_a_silenced_teacher_the_same_value(config, preset, expected):
    teacher = without(lively(config), preset)
    student, _ = make_block_student(teacher, preset, seed=0)
    pairs = feature_pairs(student, teacher)
    assert pairs == expected
    ours, theirs = features(student, teacher, pairs)
    for pair, own, other in zip(pairs, ours, theirs, strict=True):
        assert own.shape == other.shape, pair
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-4, msg=str(pair))


UNEVEN = TINY_SD1 | {"block_out_channels": [16, 32, 64, 64]}
TWO_STAGES = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "layers_per_block": 1,
}
FIVE_STAGES = {
    "block_out_channels": [16, 32, 64, 64, 64],
    "down_block_types": [*TINY_SD1["down_block_types"], "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *TINY_SD1["up_block_types"]],
}


def test_of_any_other_config_what_fits_is_copied_and_the_rest_is_fresh_under_the_seed():
    teacher = lively(UNEVEN)
    theirs = teacher.state_dict()

    student, report = make_block_student(teacher, UNEVEN | TWO_STAGES | {"mid_block_type": None}, seed=3)
    resized = {"norm1.weight", "norm1.bias", "conv1.weight", "conv_shortcut.weight"}  # a narrower stream comes up
    assert set(report.fresh) == {f"up_blocks.0.resnets.0.{name}" for name in resized}
    assert torch.equal(student.up_blocks[1].resnets[1].conv1.weight, teacher.up_blocks[3].resnets[2].conv1.weight)
    assert feature_pairs(student, teacher) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1.attentions.1"),
        ("up_blocks.0", "up_blocks.2"),
        ("up_blocks.1", "up_blocks.3"),
    ]

    deeper, report = make_block_student(teacher, UNEVEN | FIVE_STAGES | {"sample_size": 32}, seed=3)
    assert report.fresh_modules == ("down_blocks.3.downsamplers", "down_blocks.4", "up_blocks.0")
    assert report.dropped == ()
    assert torch.equal(deeper.up_blocks[1].resnets[2].conv1.weight, teacher.up_blocks[0].resnets[2].conv1.weight)
    assert feature_pairs(deeper, teacher)[3:] == [
        ("down_blocks.3.resnets.1", "down_blocks.3"),
        *((f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(4)),
    ]

    longer, report = make_block_student(teacher, UNEVEN | {"layers_per_block": 3}, seed=3)
    assert "down_blocks.0.resnets.2" in report.fresh_modules
    assert torch.equal(longer.up_blocks[2].resnets[3].conv1.weight, teacher.up_blocks[2].resnets[2].conv1.weight)

    for model in (student, deeper, longer):
        ours, others = features(model, teacher, feature_pairs(model, teacher))
        assert [own.shape for own in ours] == [other.shape for other in others]

    torch.manual_seed(3)
    plain = UNet2DConditionModel.from_config(UNEVEN | FIVE_STAGES | {"sample_size": 32}).state_dict()
    copied, report = make_block_student(teacher, UNEVEN | FIVE_STAGES | {"sample_size": 32}, seed=3)
    for name, tensor in copied.state_dict().items():
        source = report.sources.get(name)
        assert (source is None) == (name in report.fresh)
        assert torch.equal(tensor, plain[name] if source is None else theirs[source])


def test_a_half_precision_teacher_gives_a_float32_student():
    teacher = lively(TINY_SD1).to(torch.bfloat16)
    student, _ = make_block_student(teacher, "bk_small", seed=0)
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight.float())


def test_the_report_says_what_came_from_where():
    _, report = make_block_student(lively(TINY_SD1), "bk_tiny", seed=0)
    table = report.table()
    teacher, student = (parameter_count(config) for config in (TINY_SD1, student_config(TINY_SD1, "bk_tiny")))
    lines = table.splitlines()
    for text in (
        "  up_blocks.0.resnets.1 <- up_blocks.1.resnets.2",
        "  up_blocks.0.upsamplers.0 <- up_blocks.1.upsamplers.0",
        "  down_blocks.2.attentions.0 <- down_blocks.2.attentions.0",
        "  conv_in <- conv_in",
        f"tensors: {len(report.sources)} copied, 0 fresh",
    ):
        assert text in lines
    words = {"32-64-64-64", "32-64-64", f"{teacher:,}", f"{student:,}", f"{student / teacher:.2%}"}
    assert words <= set(table.split())
    assert "fresh:" not in table and table.isascii() and max(map(len, lines)) <= 100
    layers = [f"down_blocks.{i}.{kind}.1" for i in range(3) for kind in ("attentions", "resnets")]
    layers += [f"up_blocks.{i}.{kind}.1" for i in (1, 2, 3) for kind in ("attentions", "resnets")]
    assert sorted(report.dropped) == sorted(
        [*layers, "down_blocks.2.downsamplers", "down_blocks.3", "up_blocks.0", "mid_block"]
    )
    _, report = make_block_student(lively(TINY_XL), "koala_700m", seed=0)
    attentions = "down_blocks.2.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.2"
    assert {name for name in report.dropped if "transformer_blocks" in name} == {
        f"{attention}.transformer_blocks.{k}" for attention in attentions for k in (5, 6)
    }
    _, report = make_block_student(lively(UNEVEN), UNEVEN | TWO_STAGES, seed=0)
    assert "fresh: " in report.table() and "up_blocks.0.resnets.0.conv1.weight" in report.table()


ONE_STAGE = {
    "block_out_channels": [320],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}


@pytest.mark.parametrize(
    ("config", "preset", "found", "fitting"),
    [
        (SD14, "koala_700m", "at most 1", "bk_base, bk_small, bk_tiny"),
        (SD21, "koala_1b", "at most 1", "bk_base, bk_small, bk_tiny"),
        (SDXL | {"transformer_layers_per_block": [1, 2, 6]}, "koala_1b", "at most 6", "bk_base, bk_small, koala_700m"),
        (SDXL, "bk_tiny", "1280 is not 640", "bk_base, bk_small, koala_1b, koala_700m"),
        (SD14 | ONE_STAGE, "bk_tiny", "only 1", "bk_base, bk_small"),
        (SD14 | {"layers_per_block": 1}, "bk_base", "drops nothing", "bk_small, bk_tiny"),
        (SD14 | {"layers_per_block": [1] * 4, "mid_block_type": None}, "bk_small", "drops nothing", "bk_tiny"),
        (SD14, "d14", "bk_base, .*koala_1b", "bk_base, bk_small, bk_tiny"),
        ({"_class_name": "UNet2DModel"}, "bk_small", "UNet2DModel, not a UNet2DConditionModel", "none"),
        ({"_class_name": "DiTTransformer2DModel", "num_layers": 28}, "bk_base", "DiTTransformer2DModel", "none"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused_with_those_that_do(config, preset, found, fitting):
    message = (
        f"--student_preset {preset} does not fit this teacher: .*{found}.*Those that fit: {fitting};.*--student_config"
    )
    with pytest.raises(ValueError, match=message):
        student_config(config, preset)
    assert presets_for(config) == [name for name in PRESETS if name in fitting.split(", ")]
