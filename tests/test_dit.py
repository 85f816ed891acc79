# SPDX-License-Identifier: Apache-2.0
"""What DiT has of its own: labels, depth students by the flags, guidance, variances; the rest: test_contract.py."""

import json
import math
import shutil
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from conftest import read_log, run_script
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline
from diffusers.models.embeddings import LabelEmbedding
from latent_pipelines import save_classes, save_dit
from PIL import Image
from torch.distributions import Normal, kl_divergence

import train_place
from utils.backbones import choose_backbone
from utils.backbones.dit import DiT
from utils.backbones.process import Noised
from utils.backbones.variance import LearnedVariance
from utils.command_line import UsageError
from utils.distillation.features import Tapped
from utils.randomness import StepRandom
from utils.students.depth import KEPT
from utils.training.arguments import parse_args

CLASSES, LAYERS = 5, 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit") / "teacher", CLASSES, LAYERS)


def arguments(teacher: Path, *flags):
    student = [] if any("student" in str(flag) or "kept" in str(flag) for flag in flags) else ["--student_depth", "2"]
    given = ["--pretrained_model_name_or_path", teacher, "--dataset_name", "data", *student, *flags]
    return parse_args("", train_place.add_method_arguments, [str(word) for word in given])


@pytest.fixture(scope="module")
def backbone(teacher) -> DiT:
    args = arguments(teacher, "--proportion_empty_prompts", "0.5")
    return choose_backbone(args).load(args)


def a_batch(count: int = 6) -> dict[str, torch.Tensor]:
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return {"pixels": pixels, "label": torch.arange(count) % CLASSES}


def test_labels_are_dropped_once_for_both_models(backbone):
    """The label vectors that every layer of both models receives are the same, and so are those of the output."""
    student, _ = backbone.make_student(backbone.args, {})
    seen = []
    hooks = [
        module.embedding_table.register_forward_hook(lambda _, args, output: seen.append(args[0]))
        for model in (student, backbone.teacher)
        for module in model.modules()
        if isinstance(module, LabelEmbedding)
    ]
    rng = StepRandom(0, 0)
    clean, condition = backbone.encode(a_batch(64), rng)
    noised = backbone.add_noise(clean, rng)
    assert student.training
    for model in (student, backbone.teacher):
        with torch.no_grad():
            backbone.predict(Tapped(model), noised, condition)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 + 1 + LAYERS + 1  # the output asks the first layer's embedder again
    assert all(torch.equal(labels, condition["class_labels"]) for labels in seen)
    empty = condition["class_labels"] == CLASSES
    assert 0.3 < empty.float().mean() < 0.7
    assert torch.equal(condition["class_labels"][~empty], a_batch(64)["label"][~empty])


@pytest.mark.parametrize(
    "flags, kept",
    [
        ("--student_depth 2", [0, 3]),
        ("--student_depth 1", [3]),
        ("--student_depth 4", [0, 1, 2, 3]),
        ("--kept_layers 1,2", [1, 2]),
        ("--student_preset d4", [0, 1, 2, 3]),
    ],
)
def test_the_flags_say_which_layers_are_kept(backbone, teacher, flags, kept):
    args = arguments(teacher, *flags.split())
    student, table = backbone.make_student(args, {})
    assert student.config[KEPT] == kept and f"layers kept     {', '.join(map(str, kept))}" in table
    assert DiT.check(args).student["num_layers"] == len(kept)
    ours, theirs = student.transformer_blocks[-1].ff.net[2].weight, backbone.teacher.transformer_blocks[kept[-1]]
    assert torch.equal(ours, theirs.ff.net[2].weight)
    assert backbone.feature_pairs(student)[0] == ("transformer_blocks.0", f"transformer_blocks.{kept[0]}")


def test_layers_are_scored_on_several_batches(teacher, monkeypatch):
    """Of as many images as there are, and what encoded them runs in the dtype of the training afterwards."""
    args = arguments(teacher, "--student_depth", "2", "--layer_choice", "scored", "--train_batch_size", "2")
    backbone, seen = DiT.load(args), []
    assert backbone.images_for_student(args) == 16 and DiT.images_for_student(backbone, arguments(teacher)) == 64
    encode = backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda rows, rng: seen.append(rows["label"].tolist()) or encode(rows, rng))
    backbone.make_student(args, a_batch(5))
    assert seen[:3] == [[0, 1], [2, 3], [4, 0]] and len(seen) == 8
    assert backbone.vae.model is None


def test_layers_are_scored_by_the_diffusion_loss(backbone, teacher):
    """A layer that does nothing is the one that goes, and real images and labels are looked at."""
    layer = backbone.teacher.transformer_blocks[1]
    kept = {name: tensor.clone() for name, tensor in layer.norm1.state_dict().items()}
    with torch.no_grad():  # its gates are 0
        layer.norm1.linear.weight.zero_()
        layer.norm1.linear.bias.zero_()
    args = arguments(teacher, "--student_depth", "3", "--layer_choice", "scored")
    student, table = backbone.make_student(args, a_batch())
    again, _ = backbone.make_student(args, a_batch())
    layer.norm1.load_state_dict(kept)
    assert student.config[KEPT] == again.config[KEPT] == [0, 2, 3]
    assert "layer 1   score 0.000e+00  dropped" in table and table.count("kept\n") + table.endswith("kept") == 3


REFUSED = {
    "another preset": ("--student_preset bk_small", "--student_preset bk_small: of a DiT.* d14, d7, d4"),
    "too deep a preset": ("--student_preset d7", "--student_preset d7: 7 layers to be kept, of 4"),
    "too deep": ("--student_depth 5", "--student_depth: 5 layers to be kept, of 4"),
    "no depth": ("--student_depth 0", "--student_depth is 0; it must be above 0"),
    "no such layer": ("--kept_layers 0,4", "--kept_layers: 0,4; give layers of the teacher's 0 to 3"),
    "layers out of order": ("--kept_layers 2,1", "--kept_layers: 2,1; give layers"),
    "no layers": ("--kept_layers 1;2", "'1;2' is no list of numbers with commas"),
    "two students": ("--kept_layers 1 --student_depth 1", "found --student_depth and --kept_layers"),
    "width": ("--student_config x --pruning_ratio 0.5", "found --pruning_ratio and --student_config"),
    "adapters": ("--student_depth 2 --lora_rank 2", "--lora_rank 2 does not go with a DiTTransformer2DModel"),
    "another resolution": ("--student_depth 2 --resolution 64", "--resolution 64: the teacher's table of positions"),
    "channels": (
        "--student_depth 2 --validation_guidance_channels 2",
        "--validation_guidance_channels: invalid choice",
    ),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_student_is_refused_before_weights_load(teacher, flags, message, monkeypatch):
    monkeypatch.setattr("utils.backbones.base.load_component", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=message):
        DiT.load(arguments(teacher, *flags.split()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_channels": 6}, "out_channels is 6; of in_channels 4 it must be 4, or 8 with variances"),
        ({"out_channels": None}, "out_channels is None; .* for the stock pipeline to sample"),
        ({"norm_type": "ada_norm_single"}, "norm_type is ada_norm_single"),
        ({"sample_size": [8, 8]}, r"sample_size is \[8, 8\]; a DiT has one number"),
    ],
)
def test_another_transformer_is_refused(teacher, tmp_path, changes, message):
    shutil.copytree(teacher, tmp_path / "other")
    path = tmp_path / "other" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=message):
        DiT.check(arguments(tmp_path / "other"))


def test_a_variance_without_a_bound_is_refused(teacher, tmp_path, monkeypatch):
    """Under a zero terminal SNR the last timestep's is one over 0; not of other predictions."""
    monkeypatch.setattr("utils.backbones.base.load_component", lambda *_, **__: pytest.fail("weights were loaded"))
    other = shutil.copytree(teacher, tmp_path / "other")
    DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(other / "scheduler")
    with pytest.raises(UsageError, match=r"--pretrained_\w+ \S+: .* ends in noise alone \(rescale_betas_zero_snr\)"):
        DiT.load(arguments(other))
    DDPMScheduler(variance_type="learned").save_pretrained(other / "scheduler")
    with pytest.raises(UsageError, match=r"holds variances as they are \(variance_type learned\)"):
        DiT.load(arguments(other))
    DDPMScheduler(num_train_timesteps=1, beta_end=1e-4).save_pretrained(other / "scheduler")
    with pytest.raises(UsageError, match="its scheduler has a single timestep"):
        DiT.load(arguments(other))
    DDPMScheduler(num_train_timesteps=3, trained_betas=[0.0, 0.1, 0.2]).save_pretrained(other / "scheduler")
    with pytest.raises(UsageError, match="its scheduler has a timestep that adds no noise"):
        DiT.load(arguments(other))
    DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").save_pretrained(other / "scheduler")
    DiT.check(arguments(other))


def test_the_names_of_classes_survive_the_export_of_an_old_pipeline(teacher, tmp_path):
    """DiT's own pipelines on the Hub call their transformer as diffusers did then."""
    old = shutil.copytree(teacher, tmp_path / "old")
    for path in (old / "model_index.json", old / "transformer" / "config.json"):
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    args = arguments(old)
    backbone = DiT.load(args)
    student, _ = backbone.make_student(args, {})
    backbone.save(student, tmp_path / "student")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "student")
    assert pipeline.labels == DiTPipeline.from_pretrained(teacher).labels and pipeline.get_label_ids(["c", "c2"]) == [
        2,
        2,
    ]
    assert pipeline.transformer.config.num_layers == 2 and pipeline.transformer.config[KEPT] == [0, 3]
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["transformer"][1] == (
        "DiTTransformer2DModel"
    )
    args.student_depth, args.student_model_name_or_path = None, str(tmp_path / "student")
    again, _ = DiT.load(args).make_student(args, {})
    assert backbone.feature_pairs(again) == backbone.feature_pairs(student)
    args.student_model_name_or_path = str(old)  # to be trained on as it is
    whole, _ = DiT.load(args).make_student(args, {})
    assert torch.equal(whole.proj_out_2.weight, backbone.teacher.proj_out_2.weight)
    args.student_model_name_or_path, args.student_config = None, str(old / "transformer" / "config.json")
    assert DiT.load(args).make_student(args, {})[0].config.num_layers == LAYERS


def test_a_variance_that_nothing_trains_is_warned_of(teacher):
    alone = "--lambda_task 0 --lambda_kd_output 0 --lambda_kd_feat 1".split()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DiT.check(arguments(teacher, "--lambda_task", "0"))
        assert not any("the variance" in str(warning.message) for warning in caught)
        DiT.check(arguments(teacher, *alone))
    assert any("nothing trains the variance" in str(warning.message) for warning in caught)


# Guidance


def test_channels_that_nothing_guides_are_warned_of(teacher):
    with pytest.warns(UserWarning, match="--validation_guidance_channels has no effect here: at .*_scale 1 nothing"):
        DiT.check(arguments(teacher, "--validation_guidance_channels", "3", "--validation_guidance_scale", "1"))


@pytest.mark.parametrize("channels", [None, 3, 4])
def test_guidance_is_that_of_a_plain_loop(backbone, channels):
    """Of a model of 5 classes, which label 1000 would overrun."""
    backbone.args.validation_guidance_channels = channels
    backbone.sampling_options = {"guidance_scale": 3.0}
    images = backbone.sample(backbone.teacher, [1, 2], 3, [0, 4])
    x_t = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    scheduler = backbone.process.sampler()
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            time = t.expand(2)
            told, untold = (
                backbone.teacher(x_t, timestep=time, class_labels=torch.tensor(labels)).sample[:, :4]
                for labels in ([0, 4], [CLASSES, CLASSES])
            )
            guided = untold + 3.0 * (told - untold)
            guided[:, channels or 4 :] = told[:, channels or 4 :]
            x_t = scheduler.step(guided, t, x_t).prev_sample
        expected = backbone.vae().decode(x_t / 0.5).sample
    difference = images.float() - ((expected / 2 + 0.5).clamp(0, 1) * 255)
    assert difference.abs().max() <= 0.6


# Variances


def a_prediction(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 4, 6, 6)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) * 2 - 1


def gaussian(scheduler, t: int, clean, x_t, log_variance) -> Normal:
    """Ho et al. 2020, eq. 7, around x_0."""
    kept, before = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1] if t else torch.tensor(1.0)
    beta = 1 - kept / before
    mean = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - kept)
    return Normal(mean, (0.5 * log_variance).exp())


@pytest.mark.parametrize(
    "prediction_type, zero_snr",
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_variances_have_the_bound_and_the_distance(prediction_type, zero_snr):
    """Against the variances of diffusers' scheduler and the divergences of torch's distributions."""
    scheduler = DDPMScheduler(
        prediction_type=prediction_type,
        variance_type="learned_range",
        clip_sample=False,
        rescale_betas_zero_snr=zero_snr,
    )
    place = torch.tensor([0, 1, 2, 500, 999])
    (clean, _), (noise, _), (output, variance), (_, other) = (a_prediction(seed, len(place)) for seed in range(4))
    clean[0, 0, 0, :2] = torch.tensor([1.3, -1.2])  # the ends of the likelihood are open
    output[0] = {"epsilon": noise, "v_prediction": noise, "sample": clean}[prediction_type][0]  # as a trained model's
    x_t = scheduler.add_noise(clean, noise, place)
    bound, distance = [], []
    for row, t in enumerate(place.tolist()):
        step = scheduler.step(torch.cat([output, variance], dim=1)[row : row + 1], t, x_t[row : row + 1])
        # where t is 0 the true posterior is a point, and its variance that of t = 1
        ours, theirs = (scheduler._get_variance(t, predicted_variance=v[row]) for v in (variance, other))
        if t == 0:
            least, most = scheduler._get_variance(1, variance_type="fixed_small").log(), scheduler.betas[0].log()
            ours, theirs = ((v[row] + 1) / 2 * (most - least) + least for v in (variance, other))
        predicted = gaussian(scheduler, t, step.pred_original_sample[0], x_t[row], ours)
        if t == 0:
            upper, lower = (predicted.cdf(clean[row] + side / 255) for side in (1, -1))
            upper, lower = upper.masked_fill(clean[row] > 0.999, 1), lower.masked_fill(clean[row] < -0.999, 0)
            bound.append(-(upper - lower).clamp(min=1e-12).log())
        else:
            of_data = scheduler._get_variance(t, variance_type="fixed_small").log()
            bound.append(kl_divergence(gaussian(scheduler, t, clean[row], x_t[row], of_data), predicted))
        distance.append(kl_divergence(Normal(0, (theirs / 2).exp()), Normal(0, (ours / 2).exp())))

    learned, noised = LearnedVariance(scheduler), Noised(x_t, place, place, clean, noise, None)
    output.requires_grad_()
    variance.requires_grad_()
    for row, expected in enumerate(bound):  # one by one: their sizes differ
        one = slice(row, row + 1)
        alone = Noised(x_t[one], place[one], place[one], clean[one], noise[one], None)
        found = learned.bound(output[one], variance[one], alone)
        torch.testing.assert_close(found, expected.mean() / math.log(2), rtol=1e-3, atol=1e-6)
    found = learned.bound(output, variance, noised)
    torch.testing.assert_close(found, torch.stack(bound).mean() / math.log(2), rtol=1e-3, atol=0)
    found.backward()
    assert output.grad is None and variance.grad.isfinite().all() and (variance.grad != 0).float().mean() > 0.9
    expected = torch.stack(distance).mean() / math.log(2)
    torch.testing.assert_close(learned.distance(variance, other, noised), expected, rtol=1e-4, atol=0)
    assert learned.distance(other, other, noised) == 0
    learned.distance(variance, other.requires_grad_(), noised).backward()
    assert other.grad is None


def test_losses_see_the_prediction_and_the_variance_has_terms_of_its_own(backbone):
    student, _ = backbone.make_student(backbone.args, {})
    rng = StepRandom(0, 0)
    clean, condition = backbone.encode(a_batch(), rng)
    noised = backbone.add_noise(clean, rng)
    ours, theirs = (backbone.predict(Tapped(model), noised, condition) for model in (student, backbone.teacher))
    assert ours.output.shape == ours.variance.shape == clean.shape
    terms = backbone.task_terms(ours, noised)
    more = backbone.distillation_terms(ours, theirs, noised)
    assert list(terms) == ["task", "variance"] and list(more) == ["output_variance"]
    last = student.proj_out_2.bias  # of 2 x 2 places and 8 channels, the last of which are the variance's
    for term, trained in ((terms["task"], 0), (terms["variance"], 1), (more["output_variance"], 1)):
        (gradient,) = torch.autograd.grad(term, last, retain_graph=True)
        halves = gradient.reshape(4, 2, 4).abs().sum(dim=(0, 2))
        assert halves[trained] > 0 and halves[1 - trained] == 0


# Whole runs

BRIEFLY = (
    "--max_train_steps 2 --train_batch_size 4 --logging_steps 1 --report_to none --num_cpu_threads 1 "
    "--checkpointing_steps 1 --validation_shown_samples 0"
).split()


def run(folder: Path, teacher: Path, data: Path, *flags, output: str = "student") -> Path:
    given = ["--pretrained_model_name_or_path", teacher, *BRIEFLY, *flags]
    given += ["--dataset_name" if (data / "data").exists() else "--train_data_dir", data]
    return run_script(folder, "", "", "train_place", *given, output=output, defaults=False)


def test_real_images_need_no_labels(teacher, tmp_path):
    """The distance is to pictures alone, here of a split whose labels nobody knows, as ImageNet's test split."""
    (tmp_path / "images" / "data").mkdir(parents=True)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        images = [Image.new("RGB", (32, 32), (9 * i, 99, 200)) for i in range(8)]
        labels = [i % CLASSES if split == "train" else -1 for i in range(8)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds)
        rows.to_parquet(tmp_path / "images" / "data" / f"{split}-00000-of-00001.parquet")
    flags = "--student_depth 2 --validation_num_samples 4 --validation_num_inference_steps 2 --validation_split test"
    flags = [*flags.split(), "--validation_feature_extractor", "assets/classifier"]
    folder = run(tmp_path, teacher, tmp_path / "images", *flags)
    assert read_log(folder)[-1]["frechet_distance"] > 0


def test_a_resumed_student_has_the_layers_that_it_had(teacher, tmp_path, monkeypatch):
    """Scored again, on another batch or device, the choice may be another one."""
    data = save_classes(tmp_path / "images")
    flags = ["--student_depth", "2", "--layer_choice", "scored"]
    monkeypatch.setattr("utils.students.depth.layer_scores", lambda *_: [2.0, 0.0, 1.0, 3.0])
    folder = run(tmp_path, teacher, data, *flags)
    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    monkeypatch.setattr("utils.students.depth.layer_scores", lambda *_: [0.0, 2.0, 1.0, 3.0])
    for insisting in ([], ["--allow_changed_arguments"]):
        with pytest.raises(UsageError, match="its student has the teacher's layers 0,3, this one 1,3.*_layers 0,3"):
            run(tmp_path, teacher, data, *flags, *more, *insisting)
    run(tmp_path, teacher, data, "--kept_layers", "0,3", "--allow_changed_arguments", *more)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config[KEPT] == [0, 3] and len(read_log(folder)) == 3
