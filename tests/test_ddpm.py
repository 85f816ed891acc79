# SPDX-License-Identifier: Apache-2.0
"""The pixel backbone: loading, checks, noise and targets, students, samples."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, build_unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from train_place import add_method_arguments
from utils.backbones import choose_backbone
from utils.backbones.base import Prediction
from utils.backbones.ddpm import DDPM
from utils.backbones.process import Noised
from utils.distillation.features import Tapped
from utils.randomness import StepRandom
from utils.training.arguments import parse_args

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KINDS = ["epsilon", "v_prediction", "sample"]
STUDENTS = ("--pruning_ratio", "--student_config", "--student_model_name_or_path")


@pytest.fixture
def parse(tmp_path, teacher_dir):
    """Real flags, parsed; a teacher and a ratio where the call names none."""

    def parse_flags(*flags, teacher=teacher_dir) -> Namespace:
        flags = [str(flag) for flag in flags]
        argv = ["--dataset_name", "unread", "--output_dir", str(tmp_path / "output"), *flags]
        argv += ["--pretrained_model_name_or_path", str(teacher)] if teacher else ["--lambda_kd_output", "0"]
        if not any(flag in flags for flag in STUDENTS):
            argv += ["--pruning_ratio", "0.5"]
        return parse_args("", add_method_arguments, argv)

    return parse_flags


@pytest.fixture
def load(parse):
    """The backbone of these flags."""

    def load_backbone(*flags, **changes) -> DDPM:
        args = parse(*flags, **changes)
        return choose_backbone(args).load(args)

    return load_backbone


@pytest.fixture
def save(tmp_path):
    """`save(scheduler, unet)` saves a pipeline and returns its folder."""

    def save_pipeline(scheduler=None, unet=None, name="own", **settings) -> Path:
        scheduler = scheduler or DDPMScheduler()
        pipeline_class = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
        pipeline_class(unet or build_unet(), scheduler).save_pretrained(tmp_path / name, **settings)
        return tmp_path / name

    return save_pipeline


@pytest.fixture
def config(tmp_path):
    """`config(in_channels=3)` writes a U-Net's config.json and returns its path."""

    def write_config(**changes) -> Path:
        path = tmp_path / "student.json"
        path.write_text(json.dumps({"_class_name": "UNet2DModel", **TINY_UNET, **changes}))
        return path

    return write_config


def images(count=8, channels=1, side=8, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixels": torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Choosing and loading


@pytest.mark.parametrize("scheduler, pipeline_class", [(DDPMScheduler, DDPMPipeline), (DDIMScheduler, DDIMPipeline)])
def test_teachers_load_frozen_and_equal(load, save, scheduler, pipeline_class):
    unet = build_unet(seed=4)
    backbone = load(teacher=save(scheduler(num_train_timesteps=500, prediction_type="v_prediction"), unet))
    assert type(backbone) is DDPM and backbone.component == "unet"
    assert backbone.pipeline_class is pipeline_class and isinstance(backbone.process.scheduler, DDPMScheduler)
    assert backbone.process.scheduler.config.num_train_timesteps == 500
    assert backbone.process.scheduler.config.prediction_type == "v_prediction"
    teacher = backbone.teacher
    assert same_weights(teacher, unet) and not teacher.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in teacher.parameters())
    assert (backbone.image_channels, backbone.resolution) == (1, 8)


def test_half_precision_files_load_as_float32(load, save):
    unet = nn.Module.to(build_unet(), torch.bfloat16)
    teacher = load(teacher=save(unet=unet)).teacher
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())


def test_from_scratch(load, parse):
    flags = ["--student_config", RECIPES / "fashion_mnist_teacher.json"]
    backbone = load(*flags, teacher=None)
    assert backbone.teacher is None and backbone.pipeline_class is DDPMPipeline
    assert (backbone.image_channels, backbone.resolution) == (1, 16)
    assert dict(backbone.process.scheduler.config) == dict(DDPMScheduler().config)
    student, sizes = backbone.make_student(parse(*flags, teacher=None), images(2, side=16))
    assert tuple(student.config.block_out_channels) == (32, 64, 128) and student.training
    assert "2,586,337" in sizes
    assert backbone.sample(student, [0, 1], 2).shape == (2, 1, 16, 16)


def test_the_oldest_layout_with_everything_at_the_root(load, save, tmp_path):
    folder = save(DDPMScheduler(num_train_timesteps=500, clip_sample=False), build_unet(seed=3))
    root = tmp_path / "root"
    root.mkdir()
    for path in (*folder.glob("unet/*"), folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"):
        shutil.move(path, root)
    backbone = load(teacher=root)
    assert same_weights(backbone.teacher, build_unet(seed=3))
    assert (
        backbone.process.scheduler.config.num_train_timesteps == 500
        and not backbone.process.scheduler.config.clip_sample
    )
    assert backbone.sample(backbone.teacher, [0, 1], 2).shape == (2, 1, 8, 8)


def test_pickled_weights_need_a_flag(load, save):
    folder = save(unet=build_unet(seed=3), safe_serialization=False)
    assert list(folder.glob("unet/*.bin")) and not list(folder.glob("unet/*.safetensors"))
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*--allow_pickle_weights"):
        load(teacher=folder)
    assert same_weights(load("--allow_pickle_weights", teacher=folder).teacher, build_unet(seed=3))


def test_damaged_weights_are_refused(load, save):
    folder = save()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*does not load"):
        load(teacher=folder)


def test_weights_that_lack_a_tensor_are_refused(load, save):
    folder = save()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*lack 1 tensors.*conv_out.bias"):
        load(teacher=folder)


def test_samples_that_are_not_finite(load):
    backbone = load()
    with torch.no_grad():
        backbone.teacher.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="a sample holds NaN or infinity"):
        backbone.sample(backbone.teacher, [0], 2)


# What is refused before weights load


def refused(load, message, *flags, **changes):
    with pytest.raises(ValueError, match=message):
        load(*flags, **changes)


def test_no_teacher_there(load, tmp_path):
    refused(load, "--pretrained_model_name_or_path .*no such folder", teacher=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    refused(load, "--pretrained_model_name_or_path .*no model_index.json", teacher=tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text("{")
    refused(load, "--pretrained_model_name_or_path", teacher=tmp_path / "empty")


@pytest.mark.parametrize("name", ["FluxPipeline", "UNet2DConditionModel"])
def test_unsupported_teachers(load, save, name):
    index = save() / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
    refused(load, f"--pretrained_model_name_or_path .*is a {name}.*DDPMPipeline", teacher=index.parent)


def test_a_teacher_without_a_unet(load, save):
    folder = save()
    shutil.rmtree(folder / "unet")
    refused(load, "--pretrained_model_name_or_path .*holds no config of a UNet2DModel", teacher=folder)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_teacher_without_a_schedule(load, save, text):
    path = save() / "scheduler" / "scheduler_config.json"
    path.unlink()
    if text:
        path.write_text(text)
    refused(load, "--pretrained_model_name_or_path .*holds no config of a DDPMScheduler", teacher=path.parents[1])


@pytest.mark.parametrize("changes", [{"num_class_embeds": 10}, {"class_embed_type": "timestep"}])
def test_models_that_are_told_a_class(load, save, changes):
    name, flag = next(iter(changes)), "--student_model_name_or_path"
    classes, plain = save(unet=build_unet(**changes)), save(name="plain")
    refused(load, f"--pretrained_model_name_or_path: .*{name} is", flag, plain, teacher=classes)
    refused(load, f"{flag}: .*{name} is", flag, classes)
    for flags in (["--pruning_ratio", "0.5"], ["--student_config", classes / "unet" / "config.json"]):
        refused(load, f"--pretrained_model_name_or_path: .*told a class .{name} is", *flags, teacher=classes)
    config = ["--student_config", classes / "unet" / "config.json"]
    refused(load, f"--student_config: .*told a class .{name} is", *config, teacher=None)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDPMScheduler(prediction_type="v_prediction"), "its scheduler predicts v_prediction, the teacher's epsilon"),
        (DDIMScheduler(prediction_type="sample"), "its scheduler predicts sample, the teacher's epsilon"),
        (DDPMScheduler(num_train_timesteps=500), "its scheduler has num_train_timesteps 500, the teacher's 1000"),
        (DDPMScheduler(beta_start=0.001), "has beta_start 0.001, the teacher's 0.0001"),
        (DDPMScheduler(beta_end=0.01), "has beta_end 0.01, the teacher's 0.02"),
        (
            DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            "has beta_schedule squaredcos_cap_v2, the teacher's linear",
        ),
        (DDPMScheduler(rescale_betas_zero_snr=True), "has rescale_betas_zero_snr True, the teacher's False"),
    ],
)
def test_students_of_another_schedule(load, save, scheduler, message):
    flag, folder = "--student_model_name_or_path", save(scheduler)
    refused(load, f"{flag} .*{message}", flag, folder)
    load(flag, folder / "unet")  # which does not say
    load(flag, save(DDIMScheduler(clip_sample=False), name="same"))  # how it samples may differ


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_class_name": "UNet2DConditionModel"}'])
@pytest.mark.parametrize("scratch", [False, True])
def test_configs_of_no_unet(load, tmp_path, teacher_dir, text, scratch):
    path = tmp_path / "student.json"
    path.write_text(text)
    refused(load, "--student_config", "--student_config", path, teacher=None if scratch else teacher_dir)
    refused(load, "--student_config .*missing", "--student_config", tmp_path / "missing", teacher=None)


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_out_channels": [10, 20]}, "num_channels .*num_groups"),
        ({"block_out_channels": [16, 32, 64]}, "cannot build"),
        ({"down_block_types": ["DownBlock2D", "NoBlock2D"]}, "NoBlock2D"),
        ({"in_channels": 2, "out_channels": 2}, "in_channels"),
    ],
)
def test_students_that_cannot_be(load, config, teacher_dir, scratch, changes, message):
    path = config(**changes)
    refused(load, f"--student_config.*{message}", "--student_config", path, teacher=None if scratch else teacher_dir)


@pytest.mark.parametrize("changes", [{"in_channels": 3, "out_channels": 3}, {"in_channels": 3}, {"out_channels": 3}])
def test_students_that_see_another_tensor(load, config, tmp_path, changes):
    name = next(iter(changes))
    refused(load, f"--student_config.*{name} 3.*teacher 1", "--student_config", config(**changes))
    build_unet(**changes).save_pretrained(tmp_path / "student")
    flag = "--student_model_name_or_path"
    refused(load, f"{flag}.*{name} 3.*teacher 1", flag, tmp_path / "student")


def test_what_goes_in_must_come_out(load, save, config):
    """Two outputs for one input: a learned variance, or a slip that broadcasting would hide."""
    refused(load, "out_channels", "--student_config", config(out_channels=2), teacher=None)
    refused(load, "out_channels", teacher=save(unet=build_unet(out_channels=2)))


@pytest.mark.parametrize("flags", [["--resolution", "7"], ["--resolution", "9"]])
def test_resolutions_that_cannot_be_halved(load, config, flags):
    refused(load, "--resolution .*teacher.*multiple of 2", *flags)
    refused(load, "--resolution .*student.*multiple of 2", *flags, "--student_config", config(), teacher=None)


def test_a_student_may_halve_more_often(load, config):
    deep = {
        "block_out_channels": [8, 8, 8],
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
    }
    refused(load, "student.*multiple of 4", "--resolution", "6", "--student_config", config(**deep))
    assert load("--resolution", "12", "--student_config", config(**deep)).resolution == 12


@pytest.mark.parametrize("size", [None, [8, 8]])
def test_a_config_without_a_number_of_pixels(load, config, size):
    path = config(sample_size=size)
    refused(load, "--resolution", "--student_config", path, teacher=None)
    assert load("--resolution", "16", "--student_config", path, teacher=None).resolution == 16


def test_groups_that_do_not_fit_a_channel(load):
    refused(load, "--group_size 65.*8x8.*64", "--group_size", "65")
    load("--group_size", "64")
    load("--group_size", "65", "--resolution", "16")


def test_no_student_there(load, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        load,
        "--student_model_name_or_path .*holds no config of a UNet2DModel",
        "--student_model_name_or_path",
        tmp_path / "empty",
    )


# Noise, targets, weights


def test_encode(load):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    clean, condition = load().encode({"pixels": pixels}, None)
    assert condition == {} and clean.dtype == torch.float32 and clean.shape == (4, 1, 8, 8)
    assert clean.min() == -1 and clean.max() == 1
    assert torch.equal(((clean + 1) * 127.5).round().to(torch.uint8), pixels)


SCHEDULES = [
    {},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
    {"beta_start": 0.001, "beta_end": 0.01},
]


def coefficients(settings, timestep):
    """sqrt(a_bar) and sqrt(1 - a_bar), from the betas."""
    alphas = torch.cumprod(1 - DDPMScheduler(**settings).betas.double(), 0)[timestep].reshape(-1, 1, 1, 1)
    return alphas.sqrt().float(), (1 - alphas).sqrt().float()


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SCHEDULES)
def test_noise_and_targets(load, save, settings, kind, antithetic):
    flags = ["--antithetic_timesteps"] if antithetic else []
    backbone = load(*flags, teacher=save(DDPMScheduler(prediction_type=kind, **settings)))
    clean, _ = backbone.encode(images(16), None)
    noised = backbone.add_noise(clean, StepRandom(3, 5))

    rng, count = StepRandom(3, 5), settings.get("num_train_timesteps", 1000)
    timestep = rng.integers(count, 16, antithetic=antithetic)
    noise = rng.normal(clean.shape)
    signal_share, noise_share = coefficients(settings, timestep)
    assert torch.equal(noised.place, timestep) and torch.equal(noised.clean, clean) and noised.weight is None
    torch.testing.assert_close(noised.x_t, signal_share * clean + noise_share * noise, rtol=1e-4, atol=1e-5)
    if antithetic:
        assert (noised.place.reshape(-1, 2).sum(dim=1) == count - 1).all()
    if kind == "epsilon":
        assert torch.equal(noised.target, noise)
    elif kind == "sample":
        assert torch.equal(noised.target, clean)
    else:
        torch.testing.assert_close(
            signal_share * noised.x_t - noise_share * noised.target, clean, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            noise_share * noised.x_t + signal_share * noised.target, noise, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights(load, save, kind, gamma):
    backbone = load("--snr_gamma", gamma, teacher=save(DDPMScheduler(prediction_type=kind)))
    noised = backbone.add_noise(backbone.encode(images(64), None)[0], StepRandom(0, 0))
    alphas = torch.cumprod(1 - DDPMScheduler().betas.double(), 0)
    expected = []
    for t in noised.place.tolist():
        snr = (alphas[t] / (1 - alphas[t])).item()
        expected.append(min(snr, gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind])
    torch.testing.assert_close(noised.weight, torch.tensor(expected), rtol=1e-3, atol=1e-7)
    assert len({round(weight, 4) for weight in expected}) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_are_finite_where_nothing_is_left(load, save, kind):
    """A schedule that ends in pure noise has an SNR of 0."""
    backbone = load("--snr_gamma", "5", teacher=save(DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)))
    noised = backbone.process.noised(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.tensor([999]))
    assert noised.weight.isfinite().all()
    assert noised.weight == {"epsilon": 1, "v_prediction": 0, "sample": 0}[kind]


def test_task_loss(load):
    backbone = load()
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 4, 1, 8, 8, generator=generator)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0])
    noised = Noised(output, torch.zeros(4), torch.zeros(4), output, target, None)
    errors = [((output[i] - target[i]) ** 2).sum().item() / 64 for i in range(4)]
    plain = backbone.task_terms(Prediction(output, None, []), noised)["task"]
    assert plain.item() == pytest.approx(sum(errors) / 4, rel=1e-5)
    weighted = backbone.task_terms(Prediction(output, None, []), noised._replace(weight=weight))["task"]
    assert weighted.item() == pytest.approx((0.5 * errors[0] + 2 * errors[2] + errors[3]) / 4, rel=1e-5)
    ones = backbone.task_terms(Prediction(output, None, []), noised._replace(weight=torch.ones(4)))["task"]
    assert ones.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_is_float32(load, dtype):
    backbone = load()
    noised = backbone.add_noise(backbone.encode(images(3), None)[0], StepRandom(0, 0))
    expected = backbone.teacher(noised.x_t, noised.place).sample
    model = nn.Module.to(backbone.teacher, dtype)
    found = backbone.predict(Tapped(model, ["mid_block"]), noised, {})
    assert found.output.dtype == torch.float32 and len(found.features) == 1
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.output, expected, rtol=tolerance, atol=tolerance)
    assert backbone.predict(Tapped(model), noised, {}).features == []


def test_example_fits_the_models(load):
    backbone = load("--resolution", "12")
    output, _ = Tapped(backbone.teacher)(**backbone.example())
    assert output.shape == (1, 1, 12, 12)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_transform_gives_what_the_model_takes(load, save, channels):
    teacher = save(unet=build_unet(in_channels=channels, out_channels=channels))
    backbone = load("--resolution", "12", "--center_crop", teacher=teacher)
    transform = backbone.transform(backbone.args)
    assert (len(transform.mode), transform.resolution) == (channels, 12)
    assert transform.center_crop and not transform.random_flip


# Students


@pytest.mark.parametrize("init", ["taylor", "magnitude", "random"])
def test_pruned_students(load, parse, init):
    args = parse("--student_init", init, "--seed", "3")
    backbone, made = load(), []
    before = {name: tensor.clone() for name, tensor in backbone.teacher.state_dict().items()}
    for ambient in (0, 1):
        torch.manual_seed(ambient)
        student, sizes = backbone.make_student(args, images(4))
        made.append(student)
    assert type(student) is UNet2DModel and tuple(student.config.block_out_channels) == (8, 16)
    assert student.training and student.config.sample_size == 8
    assert all(p.dtype == torch.float32 and p.requires_grad and p.grad is None for p in student.parameters())
    assert same_weights(*made)
    assert "(8, 16)" in sizes or "8, 16" in sizes or "parameters" in sizes
    teacher = backbone.teacher
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_taylor_scores_over_all_timesteps_or_a_few(load, save):
    short = save(DDPMScheduler(num_train_timesteps=24))
    backbone, batch, seen = load(teacher=short), images(1), []
    make = backbone.process.noised

    @torch.no_grad()
    def solved_from_12_on(clean, noise, place):
        seen.append(place.item())
        noised = make(clean, noise, place)
        return noised if place < 12 else noised._replace(target=backbone.teacher(noised.x_t, place).sample)

    backbone.process.noised = solved_from_12_on
    losses = {count: [loss.item() for loss in backbone._diffusion_losses(batch, 0, count)] for count in (24, 6, None)}
    assert seen[:24] == list(range(24)) and len(losses[24]) == 24  # no early end
    assert len(losses[6]) == len(set(seen[24:30])) == 6 and seen[24:30:5] == [0, 23]
    assert torch.equal(torch.linspace(0, 999, 1000).long(), torch.arange(1000))  # all of a long schedule, too
    few = losses[None]
    assert 1 <= len(few) < 12 and len(seen) == 30 + len(few) + 1  # the first that is under 5 % is seen, and left out
    assert all(loss >= 0.05 * max(few[: i + 1]) for i, loss in enumerate(few))
    with pytest.raises(ValueError, match="--taylor_timesteps is 25; the teacher's schedule has 24"):
        load("--taylor_timesteps", "25", teacher=short)


def rates(model) -> set[float]:
    return {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)}


@pytest.mark.parametrize("start", ["--pruning_ratio 0.5 --student_init magnitude", "--student_config", "own"])
def test_the_students_dropout(load, parse, save, config, start, tmp_path):
    """As diffusers builds it of the student's config; the teacher's stays, and stays off."""
    teacher = save(unet=build_unet(dropout=0.2))
    flags = {"--student_config": [start, config()], "own": ["--student_model_name_or_path", teacher]}.get(start)
    flags = flags or start.split()
    backbone, made = load(*flags, teacher=teacher), {}
    for given in (None, 0.0, 0.3):
        args = parse(*flags, *([] if given is None else ["--dropout", given]), teacher=teacher)
        made[given] = student = backbone.make_student(args, images(2))[0]
        assert student.config.dropout == (student.config.dropout if given is None else given)
        student.save_pretrained(tmp_path / "saved")
        built = UNet2DModel.from_pretrained(tmp_path / "saved")
        kinds = [
            {name: layer.p for name, layer in model.named_modules() if isinstance(layer, nn.Dropout)}
            for model in (student, built)
        ]
        assert kinds[0] == kinds[1] and student.training
    assert made[None].config.dropout == (0.0 if start == "--student_config" else 0.2)  # its own config's
    assert rates(made[0.0]) == {0.0} and max(rates(made[0.3])) == 0.3
    assert max(rates(backbone.teacher)) == 0.2 and not backbone.teacher.training
    x_t, timestep = torch.randn(1, 1, 8, 8), torch.zeros(1)
    with torch.no_grad():
        drawn = [made[0.3](x_t, timestep).sample for _ in range(2)]
        assert not torch.equal(*drawn)
        assert torch.equal(*(made[0.3].eval()(x_t, timestep).sample for _ in range(2)))


def test_taylor_students_depend_on_the_images_and_random_ones_on_the_seed(load, parse):
    backbone = load()

    def made(init, seed, batch):
        return backbone.make_student(parse("--student_init", init, "--seed", seed), batch)[0]

    dark, noise = {"pixels": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, images(4)
    assert not same_weights(made("taylor", 0, dark), made("taylor", 0, noise))
    assert same_weights(made("random", 0, dark), made("random", 0, noise))
    assert not same_weights(made("random", 0, dark), made("random", 1, dark))
    assert same_weights(made("magnitude", 0, dark), made("magnitude", 0, noise))


def test_students_from_a_config(load, parse, config):
    flags = ["--student_config", config(block_out_channels=[8, 16], sample_size=32)]
    args, backbone, made = parse(*flags, "--seed", "3"), load(*flags), []
    for ambient in (0, 1):
        torch.manual_seed(ambient)
        state = torch.get_rng_state()
        made.append(backbone.make_student(args, images(2))[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(*made)
    assert not same_weights(made[0], backbone.make_student(parse(*flags, "--seed", "4"), images(2))[0])
    assert made[0].config.sample_size == backbone.resolution == 8  # the teacher's


@pytest.mark.parametrize("where", ["unet folder", "pipeline folder", "unet folder of a pipeline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_students_that_exist(load, parse, save, tmp_path, where, dtype):
    unet = nn.Module.to(build_unet(seed=7, block_out_channels=(8, 16)), dtype)
    if where == "unet folder":
        folder = tmp_path / "student"
        unet.save_pretrained(folder)
    else:
        folder = save(unet=unet, name="student")
        folder = folder if where == "pipeline folder" else folder / "unet"
    flags = ["--student_model_name_or_path", folder]
    student, _ = load(*flags).make_student(parse(*flags), images(2))
    assert same_weights(student, unet.float()) and student.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())


def test_students_pickled(load, parse, tmp_path):
    build_unet(seed=7).save_pretrained(tmp_path / "student", safe_serialization=False)
    flags = ["--student_model_name_or_path", tmp_path / "student"]
    backbone = load(*flags)
    with pytest.raises(ValueError, match="--student_model_name_or_path .*does not load"):
        backbone.make_student(parse(*flags), images(2))
    student, _ = backbone.make_student(parse(*flags, "--allow_pickle_weights"), images(2))
    assert same_weights(student, build_unet(seed=7))


def test_feature_pairs(load, config):
    backbone = load()
    pairs = backbone.feature_pairs(build_unet(1, block_out_channels=(8, 16)))
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert pairs == [(name, name) for name in names]
    assert all(backbone.teacher.get_submodule(name) is not None for name in names)
    deep = build_unet(
        block_out_channels=(8, 8, 8), down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3
    )
    with pytest.raises(ValueError, match="--lambda_kd_feat.*3 stages.*teacher 2"):
        backbone.feature_pairs(deep)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_feature_pairs_without_a_mid_block(load, save, which):
    bare, whole = build_unet(mid_block_type=None), build_unet()
    backbone = load(
        "--student_model_name_or_path",
        save(unet=bare if which == "student" else whole, name="student"),
        teacher=save(unet=bare if which == "teacher" else whole),
    )
    student = bare if which == "student" else whole
    for mine, theirs in backbone.feature_pairs(student):
        assert student.get_submodule(mine) is not None and backbone.teacher.get_submodule(theirs) is not None


# Samples and pipelines


def lively(seed=0) -> UNet2DModel:
    """A U-Net whose output has unit size, so that samples differ."""
    unet = build_unet(seed).eval()
    unet.conv_out.weight.data *= 5
    return unet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [DDPMScheduler, DDIMScheduler])
def test_samples_equal_the_stock_pipeline(load, save, kind, source):
    settings = {"prediction_type": kind, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500}
    settings |= {"timestep_spacing": "trailing", "clip_sample_range": 1.5}
    if source is DDIMScheduler:
        settings |= {"set_alpha_to_one": False, "rescale_betas_zero_snr": kind != "epsilon"}
    backbone = load(teacher=save(source(**settings), lively()))
    found = backbone.sample(backbone.teacher, [5, 6], 4)
    stock = DDIMPipeline(lively(), DDIMScheduler(**settings))
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = stock(2, generators, num_inference_steps=4, eta=0.0, output_type="np").images
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2) * 255
    assert found.dtype == torch.uint8 and found.shape == (2, 1, 8, 8) and found.is_contiguous()
    assert (found - expected).abs().max() < 0.51
    assert found.float().std() > 10


def test_samples_depend_on_their_seed_alone(load, save):
    backbone = load(teacher=save(unet=lively()))
    torch.manual_seed(0)
    whole = backbone.sample(backbone.teacher, [3, 1, 2**62], 5).int()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    turned = backbone.sample(backbone.teacher, [2**62, 1, 3], 5).int()
    assert torch.equal(torch.get_rng_state(), state)
    assert (turned.flip(0) - whole).abs().max() <= 1
    for index, seed in enumerate([3, 1, 2**62]):
        alone = backbone.sample(backbone.teacher, [seed], 5).int()
        assert (alone[0] - whole[index]).abs().max() <= 1
    assert (whole[0] - whole[1]).abs().float().mean() > 5
    twice = backbone.sample(backbone.teacher, [4, 4], 5).int()
    assert (twice[0] - twice[1]).abs().max() <= 1


def test_samples_of_another_dtype_start_from_the_same_noise(load, save):
    unet = lively()
    unet.conv_out.weight.data.zero_()
    unet.conv_out.bias.data.zero_()  # predicts no noise in any dtype, so the sample is the start, scaled and clipped
    backbone = load(teacher=save(DDPMScheduler(clip_sample=False), unet))
    expected = backbone.sample(backbone.teacher, [0, 1], 1)
    assert expected.float().std() > 10
    found = backbone.sample(nn.Module.to(backbone.teacher, torch.bfloat16), [0, 1], 1)
    assert torch.equal(found, expected)
    assert next(backbone.teacher.parameters()).dtype == torch.bfloat16


def test_sampling_leaves_the_model_alone(load):
    backbone = load()
    student = build_unet(1).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    backbone.sample(student, [0], 2)
    assert student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert dict(student.config) == dict(build_unet(1).config)


@pytest.mark.parametrize("resolution", [4, 12])
def test_another_resolution(load, parse, tmp_path, resolution):
    flags = ["--resolution", resolution]
    backbone = load(*flags)
    student, _ = backbone.make_student(parse(*flags), images(2, side=resolution))
    assert backbone.resolution == resolution == student.config.sample_size == backbone.teacher.config.sample_size
    for model in (student, backbone.teacher):
        assert backbone.sample(model, [0, 1], 2, [None] * 2).shape == (2, 1, resolution, resolution)
    backbone.pipeline(student).save_pretrained(tmp_path / "saved")
    assert DDPMPipeline.from_pretrained(tmp_path / "saved").unet.config.sample_size == resolution


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(num_train_timesteps=300, prediction_type="v_prediction", variance_type="fixed_large"),
        DDIMScheduler(set_alpha_to_one=False, steps_offset=1, clip_sample=False, timestep_spacing="trailing"),
    ],
    ids=["DDPM", "DDIM"],
)
def test_pipelines_are_saved_and_load(load, parse, save, tmp_path, scheduler):
    backbone = load(teacher=save(scheduler))
    student, _ = backbone.make_student(parse(), images(2))
    pipeline = backbone.pipeline(student)
    assert type(pipeline) is backbone.pipeline_class
    pipeline.save_pretrained(tmp_path / "saved")
    again = type(pipeline).from_pretrained(tmp_path / "saved")
    assert same_weights(again.unet, student) and type(again.unet) is UNet2DModel
    assert type(again.scheduler) is type(scheduler)
    public = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert {name: again.scheduler.config[name] for name in public} == public
    again.set_progress_bar_config(disable=True)
    sampled = again(1, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert sampled.shape == (1, 8, 8, 1)
    if isinstance(scheduler, DDPMScheduler):
        assert same_weights(DDPMPipeline.from_pretrained(tmp_path / "saved").unet, student)
