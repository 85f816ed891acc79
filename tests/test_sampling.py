# SPDX-License-Identifier: Apache-2.0
"""Real tiny pipelines of several families as functions of (seed, index), and what they cost."""

import argparse
import json
from argparse import Namespace

import pytest
import torch
from conftest import build_unet
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from utils.backbones.base import Configs
from utils.backbones.ddpm import DDPM
from utils.backbones.diffusion import Diffusion
from utils.evaluation.conditions import read_prompts
from utils.evaluation.cost import Meter, cost
from utils.evaluation.pipelines import denoiser_of, load_pipeline, pipeline_files, pipeline_folder, use_scheduler
from utils.evaluation.sampler import STREAM, Sampler
from utils.publishing.readable import cost_rows
from utils.randomness import seed_from
from utils.students.lora import add_lora, save_lora
from utils.students.sizes import model_size

CPU = torch.device("cpu")


def seeded(function):
    """Random weights that do not depend on the tests before."""

    def build(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = function(*args, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@seeded
def tiny_ddpm(scheduler=None) -> DDPMPipeline:
    return DDPMPipeline(build_unet().eval(), scheduler or DDPMScheduler())


TWO_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, shift_factor=0.0, **TWO_BLOCKS
    ).eval()


@seeded
def tiny_dit(scheduler=None) -> DiTPipeline:
    """16x16, 1000 classes (DiTPipeline's null class is 1000), learned variance."""
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    model = DiTTransformer2DModel(in_channels=4, out_channels=8, norm_type="ada_norm_zero", **sizes).eval()
    for parameter in model.parameters():  # some start at 0, and would make all classes one
        torch.nn.init.normal_(parameter, std=0.1)
    return DiTPipeline(model, tiny_vae(), scheduler or DDIMScheduler())


def tiny_text(model_class=CLIPTextModel) -> dict:
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>"])}
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPTextConfig(vocab_size=5, max_position_embeddings=77, projection_dim=8, **sizes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    return {
        "text_encoder": model_class(config).eval(),
        "tokenizer": CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77),
    }


@seeded
def tiny_stable_diffusion() -> StableDiffusionPipeline:
    """16x16."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    return StableDiffusionPipeline(vae=tiny_vae(), unet=unet.eval(), scheduler=scheduler, **tiny_text(), **extras)


@seeded
def tiny_sd3() -> StableDiffusion3Pipeline:
    """16x16, flow matching, without T5."""
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 1}
    widths = {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    model = SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=16, **sizes, **widths).eval()
    first, second = tiny_text(CLIPTextModelWithProjection), tiny_text(CLIPTextModelWithProjection)
    return StableDiffusion3Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        **first,
        **{f"{name}_2": part for name, part in second.items()},
        text_encoder_3=None,
        tokenizer_3=None,
    )


def same_but_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Batches of other sizes sum in another order: at most a grey level apart."""
    return (a.int() - b.int()).abs().max().item() <= 1


def test_it_is_ddim_as_validation_samples_it():
    pipeline, seeds = tiny_ddpm(DDIMScheduler()), [seed_from(7, STREAM, index) for index in range(5)]
    flags = argparse.Namespace(antithetic_timesteps=False, snr_gamma=None, noise_offset=0.0, input_perturbation=0.0)
    flags.taylor_timesteps = None
    process = Diffusion(flags, DDPMScheduler(), bounded=True)
    backbone = DDPM(flags, None, Configs(None, dict(pipeline.unet.config), 8, None, process))
    expected = backbone.sample(pipeline.unet, seeds, 4)
    assert torch.equal(Sampler(pipeline, seed=7, num_inference_steps=4)(range(5)), expected)


FAMILIES = {
    "ddpm": (tiny_ddpm, {}),
    "ddim with eta": (lambda: tiny_ddpm(DDIMScheduler()), {"eta": 1.0}),
    "dit": (tiny_dit, {"guidance_scale": 3.0}),
    "dit, stochastic": (lambda: tiny_dit(DDPMScheduler()), {"guidance_scale": 3.0}),
    "stable diffusion": (tiny_stable_diffusion, {"prompts": ["a b", "c", "b"], "guidance_scale": 5.0}),
    "sd3": (tiny_sd3, {"prompts": ["a b", "c", "b"]}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_a_function_of_seed_and_index(family):
    build, flags = FAMILIES[family]
    sampler = Sampler(build(), seed=3, num_inference_steps=3, **flags)
    whole = sampler(range(6))
    assert whole.dtype == torch.uint8 and whole.shape[0] == 6 and whole.shape[-2:] == sampler.size()
    torch.manual_seed(99)  # nothing ambient matters
    assert torch.equal(sampler(range(6)), whole)
    assert same_but_rounding(sampler(range(2, 5)), whole[2:5])
    assert same_but_rounding(sampler([4]), whole[4:5])
    assert not same_but_rounding(whole[:1], whole[1:2])
    assert not same_but_rounding(Sampler(build(), seed=4, num_inference_steps=3, **flags)(range(6)), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_draw_what_one_draws(family):
    build, flags = FAMILIES[family]
    # of other lengths, so that tokenizers pad otherwise in every block
    prompts = {"prompts": ["a", "a b", "a b c a b c a b c", "b", "c c c"]} if "prompts" in flags else {}
    sampler = Sampler(build(), num_inference_steps=2, **{**flags, **prompts})
    blocks = [range(first, first + 2) for first in range(0, 24, 2)]
    drawn = {}
    records = list(
        Meter(sampler, CPU, threads=4).draw(blocks, keep=lambda block, images, _: drawn.update({block: images}))
    )
    assert [record["images"] for record in records] == [2] * 12 and not sampler.draws_ambient_noise
    for block in blocks:
        assert torch.equal(drawn[block], sampler(block)), block


def test_a_pipeline_that_draws_ambient_noise_is_left_to_one_thread():
    class Ambient(DDPMPipeline):
        def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="pt"):
            found = super().__call__(batch_size, generator, num_inference_steps, output_type)
            noise = torch.rand(found.images.shape)  # older pipelines give arrays whatever they are asked for
            found.images = noise if isinstance(found.images, torch.Tensor) else noise.numpy()
            return found

    unet, scheduler = tiny_ddpm().unet, DDPMScheduler()
    pipeline = Ambient(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    sampler, drawn = Sampler(pipeline, num_inference_steps=1), {}
    blocks = [range(first, first + 2) for first in range(0, 8, 2)]
    meter = Meter(sampler, CPU, threads=4)
    list(meter.draw(blocks, keep=lambda block, images, _: drawn.update({block: images})))
    assert sampler.draws_ambient_noise and meter.threads == 1
    assert all(torch.equal(drawn[block], sampler(block)) for block in blocks)


def test_a_block_that_fails_ends_the_others():
    begun = []

    def keep(block, images, record):
        begun.append(block)
        if block.start == 2:
            raise OSError("the disk is full")

    meter = Meter(Sampler(tiny_ddpm(), num_inference_steps=1), CPU, threads=2)
    with pytest.raises(OSError, match="disk is full"):
        list(meter.draw([range(i, i + 1) for i in range(200)], keep=keep))
    assert len(begun) < 100


def test_labels_and_prompts_go_by_index():
    build = tiny_dit
    balanced = Sampler(build(), num_inference_steps=2)
    listed = Sampler(build(), num_inference_steps=2, class_labels=[5, 1])
    assert balanced.class_labels == range(1000)
    seen = []
    balanced.pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    balanced([998, 999, 1000, 1001])
    assert seen[0] == [998, 999, 0, 1, 1000, 1000, 1000, 1000]
    seen.clear()
    listed.pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    listed([3, 4, 5])
    assert seen[0][:3] == [1, 5, 1]

    sampler = Sampler(tiny_stable_diffusion(), prompts=["a", "b c"], num_inference_steps=2)
    seen.clear()
    sampler.pipeline.text_encoder.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"])[:, 1:3].tolist()),
        with_kwargs=True,
    )
    sampler([1, 2, 3])
    assert seen[0] == [[3, 4], [2, 1], [3, 4]]  # "b c", "a" and its end, "b c"


def test_eta_reaches_the_scheduler_of_any_pipeline():
    generators = [torch.Generator().manual_seed(seed_from(0, STREAM, i)) for i in range(4)]
    stock = DDIMPipeline(build_unet().eval(), DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    pixels = stock(4, generators, eta=1.0, num_inference_steps=5, output_type="np").images
    expected = torch.from_numpy((pixels * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    for pipeline in (tiny_ddpm(DDIMScheduler()), stock):  # DDPMPipeline knows no eta
        assert torch.equal(Sampler(pipeline, eta=1.0, num_inference_steps=5)(range(4)), expected)
        assert not same_but_rounding(Sampler(pipeline, eta=0.0, num_inference_steps=5)(range(4)), expected)
    with pytest.raises(ValueError, match="--eta has no effect: a DDPMScheduler.*--scheduler DDIMScheduler"):
        Sampler(tiny_ddpm(), eta=1.0)


@pytest.mark.slow
def test_every_compatible_scheduler_samples_or_is_refused():
    ran, refused = set(), set()
    for cls in DDPMScheduler().compatibles:
        pipeline = tiny_ddpm()
        try:
            use_scheduler(pipeline, cls.__name__)
            sampler = Sampler(pipeline, num_inference_steps=6)
        except ValueError as error:
            refused.add(cls.__name__)
            assert "scale" in str(error) or "requires the torchsde" in str(error)
            continue
        assert torch.equal(sampler(range(3)), sampler(range(3)))  # no step remembers the block before
        ran.add(cls.__name__)
    assert {"DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"} <= ran
    assert {"EulerDiscreteScheduler", "HeunDiscreteScheduler", "EDMEulerScheduler"} <= refused
    pipeline = tiny_stable_diffusion()  # scales its noise, so may have it
    use_scheduler(pipeline, "EulerDiscreteScheduler")
    assert Sampler(pipeline, prompts=["a"], num_inference_steps=2)(range(2)).shape == (2, 3, 16, 16)


def test_another_scheduler_clips_latents_only_if_told():
    def clipping(pipeline, **own) -> bool:
        without = {name: value for name, value in pipeline.scheduler.config.items() if name != "clip_sample"}
        pipeline.scheduler = PNDMScheduler.from_config({**without, **own})
        use_scheduler(pipeline, "DDIMScheduler")
        return pipeline.scheduler.config.clip_sample

    assert not clipping(tiny_stable_diffusion()) and not clipping(tiny_stable_diffusion(), clip_sample=False)
    assert clipping(tiny_stable_diffusion(), clip_sample=True) and clipping(tiny_ddpm())
    assert not clipping(tiny_ldm())  # its decoder is a vqvae


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (tiny_ddpm, "DreamScheduler", "is no scheduler of diffusers.*DDIMScheduler"),
        (tiny_ddpm, "FlowMatchEulerDiscreteScheduler", "is for another kind of model"),
        (tiny_ddpm, "UNet2DModel", "is for another kind of model"),
        (tiny_sd3, "DDIMScheduler", "is for another kind of model.*FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(build, name, message):
    with pytest.raises(ValueError, match=f"--scheduler {name} {message}"):
        use_scheduler(build(), name)


@pytest.mark.parametrize(
    ("build", "flags", "message"),
    [
        (tiny_ddpm, {"guidance_scale": 2.0}, "--guidance_scale has no effect: a DDPMPipeline"),
        (tiny_ddpm, {"height": 16}, "--height has no effect"),
        (tiny_ddpm, {"class_labels": [1]}, "--class_labels has no effect"),
        (tiny_ddpm, {"prompts": ["a"]}, "--prompts has no effect"),
        (tiny_ddpm, {"num_inference_steps": 1001}, "--num_inference_steps 1001"),
        (tiny_dit, {"class_labels": [1000]}, "--class_labels: .* 0 to 999"),
        (tiny_stable_diffusion, {}, "give --prompts FILE"),
        (tiny_stable_diffusion, {"prompts": ["a"], "height": 21}, "--height is 21; .* draws multiples of 2"),
    ],
)
def test_arguments_without_effect_or_missing_are_refused(build, flags, message):
    with pytest.raises(ValueError, match=message):
        Sampler(build(), **flags)


def test_the_size_is_what_is_drawn():
    assert Sampler(DDPMPipeline(build_unet(sample_size=(8, 12)), DDPMScheduler())).size() == (8, 12)
    assert Sampler(tiny_ddpm()).size() == (8, 8) and Sampler(tiny_dit()).size() == (16, 16)
    sampler = Sampler(tiny_stable_diffusion(), prompts=["a"], num_inference_steps=2, height=24, width=24)
    assert sampler.size() == (24, 24) and sampler(range(2)).shape == (2, 3, 24, 24)
    assert Sampler(tiny_stable_diffusion(), prompts=["a"], height=24).size() == (24, 16)


def test_an_sd3_without_t5_loads(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path, "--x", dtype=torch.float32, device="cpu")
    assert pipeline.text_encoder_3 is None
    assert Sampler(pipeline, prompts=["a"], num_inference_steps=2)(range(2)).shape == (2, 3, 16, 16)


def test_adapters_beside_a_pipeline_are_applied_and_counted(tmp_path):
    plain = tiny_stable_diffusion()
    plain.save_pretrained(tmp_path)
    (tmp_path / "v1-5-pruned.safetensors").write_bytes(b"0" * 1000)  # that nothing loads
    unet = tiny_stable_diffusion().unet
    add_lora(unet, rank=2, seed=0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_lora(unet, StableDiffusionPipeline, "unet", tmp_path)
    pipeline = load_pipeline(tmp_path, "--x", dtype=torch.float32, device="cpu")
    flags = {"prompts": ["a b", "c"], "num_inference_steps": 2}
    adapted, bare = Sampler(pipeline, **flags)(range(2)), Sampler(plain, **flags)(range(2))
    assert not same_but_rounding(adapted, bare)
    names = {path.name for path in pipeline_files(tmp_path, pipeline, None)}
    assert "pytorch_lora_weights.safetensors" in names and "v1-5-pruned.safetensors" not in names


def test_a_schedule_that_the_pipeline_shifts():
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sampler = Sampler(pipeline, prompts=["a"], num_inference_steps=2)
    assert sampler(range(2)).shape == (2, 3, 16, 16)


def test_a_consistency_model_without_classes():
    pipeline = ConsistencyModelPipeline(build_unet().eval(), CMStochasticIterativeScheduler())
    pipeline.set_progress_bar_config(disable=True)
    sampler = Sampler(pipeline, num_inference_steps=2)
    assert sampler.class_labels is None and sampler(range(3)).shape == (3, 1, 8, 8)


def tiny_ldm() -> LDMPipeline:
    vqvae = VQModel(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, **TWO_BLOCKS).eval()
    unet = build_unet(in_channels=3, out_channels=3).eval()
    pipeline = LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_pipeline_that_gives_arrays():
    sampler = Sampler(tiny_ldm(), num_inference_steps=2)
    images = sampler(range(3))
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16) and sampler.size() == (16, 16)


def test_seconds_are_those_of_the_threads_that_had_work():
    meter = Meter(Sampler(tiny_ddpm(), num_inference_steps=1), CPU, threads=8)
    list(meter.draw([range(0, 1), range(1, 2), range(2, 3)]))
    assert meter.threads == 2  # the first block is drawn alone


def test_prompts_are_read_line_by_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\na\u2028dog \n\n".encode())
    assert read_prompts(Namespace(caption_column=None, prompts=str(tmp_path / "prompts.txt")), None) == [
        *("a cat", "a\u2028dog")
    ]


def test_samples_that_are_not_finite_stop_the_run():
    pipeline = tiny_ddpm(DDIMScheduler(clip_sample=False))
    pipeline.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="samples 5 to 7 are not finite"):
        Sampler(pipeline, num_inference_steps=2)([5, 6, 7])


def test_pickled_weights_only_when_asked(tmp_path):
    tiny_ddpm().save_pretrained(tmp_path, safe_serialization=False)
    flags = {"dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ValueError, match="--x .* does not load.*--allow_pickle_weights"):
        load_pipeline(tmp_path, "--x", **flags)
    assert isinstance(load_pipeline(tmp_path, "--x", pickled=True, **flags), DDPMPipeline)
    with pytest.raises(ValueError, match="--x .*no model_index.json"):
        pipeline_folder(str(tmp_path / "unet"), "--x")


def test_the_cost_is_counted(tmp_path):
    sampler = Sampler(tiny_ddpm(DDIMScheduler()), num_inference_steps=5)
    plain = sampler(range(4))
    drawn = []
    first, second = Meter(sampler, CPU).draw(
        [range(4), range(4, 6)], keep=lambda _, images, record: drawn.append(images)
    )
    assert torch.equal(drawn[0], plain)  # counting leaves the samples alone
    assert (first["forwards_per_image"], second["forwards_per_image"]) == (5, 5)
    assert (first["warmed_up"], second["warmed_up"]) == (False, True)
    size = model_size(sampler.pipeline.unet.config)  # counted on the meta device, without running
    assert first["macs"] == size.macs
    first["seconds"], second["seconds"] = 100.0, 3.0
    sampler.pipeline.save_pretrained(tmp_path)
    files = pipeline_files(tmp_path, sampler.pipeline, None)
    found = cost(sampler.pipeline, [first, second], files, num_processes=2)
    assert found["parameters"] == size.parameters and found["macs_per_image"] == 5 * size.macs
    assert found["seconds_per_image"] == 1.5 and found["images_per_second"] == 2 / 1.5  # the warm-up is left out
    assert found["size_on_disk_bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert cost(sampler.pipeline, [first], files, num_processes=1)["seconds_per_image"] == 25  # there is no other
    sampler.pipeline.to(torch.float16).save_pretrained(tmp_path)
    half = cost(sampler.pipeline, [first], files, num_processes=1)
    rows = {label.strip(): cells for label, *cells in cost_rows(found, half)}
    assert rows["of weights in"] == ["float32", "float16", ""]  # why its size is twice the other's
    weights = 4 * size.parameters
    assert weights <= found["peak_memory_bytes"] < weights + 2**27  # the process has several times as much


def test_memory_is_what_sampling_adds():
    """More for a larger batch, the same whatever else the process keeps."""
    sampler = Sampler(tiny_ddpm(DDIMScheduler()), num_inference_steps=1)
    found = []
    for count, kept in ((8, 0), (512, 0), (512, 2**28)):
        ballast = torch.ones(kept, dtype=torch.uint8)
        (record,) = Meter(sampler, CPU).draw([range(count)])
        found.append(record["peak_memory_bytes"])
        del ballast
    assert found[1] > 2 * found[0]
    assert abs(found[2] - found[1]) < 2**27


def test_guidance_costs_two_forwards():
    flags = {"prompts": ["a"], "num_inference_steps": 2}
    forwards = []
    for scale in (1.0, 4.0):
        (record,) = Meter(Sampler(tiny_stable_diffusion(), guidance_scale=scale, **flags), CPU).draw([range(3)])
        forwards.append(record["forwards_per_image"])
    assert forwards[1] == 2 * forwards[0]


def test_the_files_of_a_pipeline_are_one_set_of_weights(tmp_path):
    pipeline = tiny_ddpm()
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "student.safetensors").write_bytes(b"x" * 100)

    def weights(variant):
        names = [path.name for path in pipeline_files(tmp_path, pipeline, variant)]
        assert "model_index.json" in names and "config.json" in names and "scheduler_config.json" in names
        return [name for name in names if name.endswith("safetensors")]

    assert weights(None) == ["diffusion_pytorch_model.safetensors"]
    assert weights("fp16") == ["diffusion_pytorch_model.fp16.safetensors"]


def test_the_protocol_names_what_decides_the_samples():
    sampler = Sampler(tiny_ddpm(DDIMScheduler()), num_inference_steps=5, seed=2)
    protocol = json.loads(json.dumps(sampler.protocol))
    wanted = {
        "pipeline": "DDPMPipeline",
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 5,
        "eta": 0.0,
        "seed": 2,
    }
    assert wanted.items() <= protocol.items() and protocol["scheduler_config"]["num_train_timesteps"] == 1000
    assert Sampler(tiny_ddpm()).protocol["num_inference_steps"] == 1000  # the pipeline's own
    assert denoiser_of(tiny_dit()).__class__ is DiTTransformer2DModel
