# SPDX-License-Identifier: Apache-2.0
"""What the caches on disk depend on: every setting, file and picture that makes their content, and nothing else."""

import shutil
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
from latent_pipelines import save_captioned, save_pipeline
from safetensors.torch import load_file, save_file

import train_place
from utils.backbones import choose_backbone
from utils.backbones.stable_diffusion import StableDiffusion
from utils.command_line import UsageError
from utils.data.cache import CachedRows, _begin, check_cache
from utils.data.cache_key import cache_settings, content_hash, encoder_hashes
from utils.data.rows import ImageRows
from utils.data.transforms import ImageTransform
from utils.evaluation.image_sets import ImageSet
from utils.evaluation.reference import cache_key as reference_key
from utils.files import write_json
from utils.training.arguments import parse_args


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("teacher") / "sd1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return save_captioned(tmp_path_factory.mktemp("pictures") / "images")


@pytest.fixture(scope="module")
def load(teacher):
    """`load("--flag", value, teacher=...)`: a backbone; the U-Net, on which no cache depends, is loaded once."""
    loaded = []

    def backbone(*flags, teacher=teacher) -> StableDiffusion:
        given = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", "unused"]
        words = [str(word) for word in (*given, "--student_preset", "bk_small", *flags)]
        args = parse_args("", train_place.add_method_arguments, words)
        if not loaded:
            loaded.append(choose_backbone(args).load(args))
        first = loaded[0]
        configs = first.configs._replace(resolution=args.resolution or first.resolution)
        return type(first)(args, first.teacher, configs)

    return backbone


CACHE_FLAGS = {
    "content": ("--max_train_samples", 5),
    "image_column": ("--image_column", "photo"),
    "resolution": ("--resolution", 16),
    "center_crop": ("--center_crop",),
    "random_flip": ("--random_flip",),
    "caption_column": ("--caption_column", "title"),
    "dtype": ("--teacher_dtype", "bf16"),
    "seed": ("--seed", 5),
    "variants": ("--cache_variants", 3),
}
# of a folder: files that are loaded, and files beside them that are not
CACHE_FILES = {
    "vae": (("vae/diffusion_pytorch_model.safetensors", "vae/config.json"), ("vae/.DS_Store", "vae/._config.json")),
    "text_encoder": (
        ("text_encoder/model.safetensors", "text_encoder/config.json"),
        ("text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin"),
    ),
    "tokenizer": (("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"), ()),
    "pipeline": ((), ("unet/diffusion_pytorch_model.safetensors",)),
}


@pytest.fixture(scope="module")
def cache_key(load, teacher, pictures):
    """`cache_key(*flags, teacher=...)`: of a cache of these pictures; their columns have two names."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
    rows = rows.add_column("title", rows["text"]).cast_column("image", datasets.Image(decode=False))
    rows = rows.add_column("photo", rows["image"])
    accelerator = Namespace(mixed_precision="no")

    def key(*flags, teacher=teacher, data=rows):
        backbone = load(*flags, teacher=teacher)
        chosen = data.select(range(backbone.args.max_train_samples or len(data))) if data else None
        dataset = ImageRows(chosen, backbone.transform(backbone.args), 0, quiet=True) if data else None
        return cache_settings(backbone.args, accelerator, dataset, backbone)

    return key


def differing(one: dict, other: dict) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def test_every_setting_changes_the_key_of_a_cache(cache_key):
    plain = cache_key()
    assert plain == cache_key() and set(CACHE_FLAGS) | set(CACHE_FILES) <= plain.keys()
    for name, flags in CACHE_FLAGS.items():
        found = differing(plain, cache_key(*flags))
        assert name in found, (name, found)
    assert differing(plain, cache_key(data=None)) == {
        "data",
        "rows",
        "content",
        "image_column",
        "caption_column",
        "columns",
    }


def test_a_new_field_of_the_transform_changes_it_too(cache_key, monkeypatch):
    """So that who adds a setting need not know of caches."""
    plain, made = cache_key(), ImageTransform.__init__
    monkeypatch.setattr(
        ImageTransform, "__init__", lambda self, *a, **k: (made(self, *a, **k), setattr(self, "new", 1))[0]
    )
    assert differing(plain, cache_key()) == {"new"}


def test_every_file_of_the_encoders_changes_the_key_of_a_cache(cache_key, load, teacher, tmp_path):
    plain = cache_key()
    teacher = shutil.copytree(teacher, tmp_path / "moved")
    assert cache_key(teacher=teacher) == plain
    args = load(teacher=teacher).args
    for name, (loaded, beside) in CACHE_FILES.items():
        for file in loaded:
            content = (teacher / file).read_bytes()
            (teacher / file).write_bytes(content + b" ")
            assert differing(plain, plain | encoder_hashes(args, ["vae", "text_encoder"])) == {name}, file
            (teacher / file).write_bytes(content)
        for file in beside:
            (teacher / file).write_bytes(b"another")
    assert plain == plain | encoder_hashes(args, ["vae", "text_encoder"])
    args.variant = "fp16"
    assert differing(plain, plain | encoder_hashes(args, ["vae", "text_encoder"])) == {"text_encoder"}
    args.variant = None
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):  # pickled: all there is
        (teacher / f"{part}.safetensors").rename(teacher / f"{part}.bin")
    pickled = encoder_hashes(args, ["vae", "text_encoder"])
    (teacher / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"another")
    assert differing(pickled, encoder_hashes(args, ["vae", "text_encoder"])) == {"vae"}


def test_a_cache_that_another_run_has_begun_meanwhile(load, pictures, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
    rows, accelerator = rows.cast_column("image", datasets.Image(decode=False)), Namespace(mixed_precision="no")

    def begin(*flags):
        backbone = load("--latent_cache_dir", tmp_path / "cache", *flags)
        _begin(backbone.args, accelerator, ImageRows(rows, backbone.transform(backbone.args), 0, quiet=True), backbone)

    begin()
    begin()
    with pytest.raises(ValueError, match="made with other settings: seed was 0, is 5"):
        begin("--seed", 5)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 3, "rows'])
def test_a_cache_whose_record_is_cut_off(load, tmp_path, content):
    """By a full disk: nobody can tell what it is of, and no version is to blame."""
    (tmp_path / "cache.json").write_text(content)
    backbone = load("--latent_cache_dir", tmp_path)
    with pytest.raises(UsageError, match="--latent_cache_dir .*cache.json is empty or cut off"):
        check_cache(backbone.args, Namespace(mixed_precision="no"), None, backbone)


def test_a_file_of_a_cache_that_is_damaged_or_missing_is_named(load, tmp_path):
    write_json(tmp_path / "cache.json", {"rows": 2, "variants": 1, "data": ""})
    (tmp_path / "text-000000 copy.safetensors").write_bytes(b"of a file manager: not read")
    with pytest.raises(ValueError, match="--latent_cache_dir .*: empty.safetensors is missing or damaged .*encode"):
        CachedRows(tmp_path, load())
    (tmp_path / "text-000000.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="--latent_cache_dir .*: text-000000.safetensors is missing or damaged"):
        CachedRows(tmp_path, load())


def test_another_vae_counts_by_its_files(cache_key, teacher, tmp_path):
    vae = shutil.copytree(teacher / "vae", tmp_path / "vae")
    key = cache_key("--pretrained_vae_model_name_or_path", vae)
    assert key == cache_key()  # the same files
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, vae / "diffusion_pytorch_model.safetensors")
    assert differing(key, cache_key("--pretrained_vae_model_name_or_path", vae)) == {"vae"}


def test_one_changed_picture_or_caption_changes_the_key_of_a_cache(tmp_path):
    """Whichever it is, of more than the fingerprint's 32."""
    paths, captions = [tmp_path / f"{i:02d}.png" for i in range(70)], ["a"] * 70
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))

    def hashed():
        stored = [{"bytes": None, "path": str(path)} for path in paths]
        rows = datasets.Dataset.from_dict({"image": stored, "text": captions, "label": list(range(70))})
        return content_hash(rows, ("image", "text"))

    before = hashed()
    paths[41].write_bytes(b"another")
    assert hashed() != before
    paths[41].unlink()  # a dead path counts as no bytes
    assert hashed() != before
    paths[41].write_bytes(bytes([41]))
    assert hashed() == before
    captions[41] = "b"
    assert hashed() != before
    captions[41], paths[41] = "a", paths[41].rename(tmp_path / "moved.png")
    assert hashed() == before


def test_every_setting_changes_the_key_of_a_reference(tmp_path):
    folder = save_captioned(tmp_path / "images", count=2)
    args, extractor = Namespace(batch_size=4), Namespace(protocol={"sha256": {"model.safetensors": "1"}})

    def key(read=None, **changes):
        images = ImageSet.from_files(sorted(folder.glob("*.png")), "--reference_images")
        images.keep_size(quiet=True)
        if read:
            read(images)
        return reference_key(args, images, images.content_hash(quiet=True), extractor, "cpu") | changes

    def setting(name, value):
        return lambda images: setattr(images.transform, name, value)

    plain = key()
    assert plain == key()
    for name, value in ImageSet.from_files([], "").transform.settings().items():
        other = key(setting(name, not value if isinstance(value, bool) else "RGBA" if name == "mode" else 7))
        assert differing(plain, other) == ({"read"} if name != "image_column" else set()), name
    assert differing(plain, key(setting("new", 1))) == {"read"}  # of a field that is added later
    assert differing(plain, key(lambda images: images.resize_to(36))) == {"read"}
    extractor.protocol = {"sha256": {"model.safetensors": "2"}}
    assert differing(plain, key()) == {"extractor"}
    args.batch_size = 5
    assert differing(plain, key()) == {"extractor", "batch_size"}
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes() + b" ")
    assert differing(plain, key()) == {"extractor", "batch_size", "content"}
