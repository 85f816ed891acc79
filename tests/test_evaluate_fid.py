# SPDX-License-Identifier: Apache-2.0
"""evaluate_fid.py, run for real on tiny pipelines: one process and two, killed and started again."""

import json
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import build_unet, read_log, save_images
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from test_html_report import Page, check_alone
from test_sampling import tiny_ddpm, tiny_stable_diffusion, tiny_text
from transformers import (
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

import evaluate_fid
from utils.command_line import call
from utils.evaluation.arguments import METRICS
from utils.evaluation.image_sets import ImageSet, image_files
from utils.metrics.extractors import load_extractor
from utils.metrics.statistics import FeatureStatistics

ROOT = Path(__file__).resolve().parent.parent
CLASSIFIER = str(ROOT / "assets" / "classifier")
LISTED = ["fid", "kid", "pr", "is"]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def flags(tmp_path, teacher_dir, data_dir, cache_dir):
    """`flags("--flag", value, ...)`: the command line of a small evaluation. Flags in the call win, None removes."""

    def make(*given, output: str = "evaluation") -> list[str]:
        values = {
            "--pretrained_model_name_or_path": teacher_dir,
            "--dataset_name": data_dir,
            "--split": "test",
            "--feature_extractor": CLASSIFIER,
            "--num_samples": 20,
            "--batch_size": 8,
            "--num_inference_steps": 3,
            "--kid_subset_size": 10,
            "--reference_cache_dir": cache_dir,
            "--output_dir": tmp_path / output,
        }
        words = [str(word) for word in given if word is not None]
        for name in [name for name in values if name in words]:
            del values[name]
        for name in [given[i - 1] for i, word in enumerate(given) if word is None]:  # "--flag", None
            words.remove(name)
        return [str(word) for pair in values.items() for word in pair] + words

    return make


@pytest.fixture
def evaluate(flags, tmp_path):
    """`evaluate("--flag", value, ...)` runs the script in this process; the content of metrics.json."""

    def run(*given, output: str = "evaluation") -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        torch.manual_seed(len(given))  # nothing ambient matters
        call(evaluate_fid, flags(*given, output=output))
        return json.loads((tmp_path / output / "metrics.json").read_text())

    return run


def save_pngs(folder: Path, count: int, side: int | tuple[int, int] = 8, seed: int = 0) -> Path:
    generator, shape = np.random.default_rng(seed), (side, side) if isinstance(side, int) else side
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def features_of(paths) -> np.ndarray:
    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths]
    return load_extractor(CLASSIFIER)(torch.stack(images)).double().numpy()


def plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the definition, with SciPy's matrix root."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def plain_precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 5) -> tuple[float, float]:
    """By the definition, with all distances at once."""

    def covered(points, by):
        radii = np.sort(scipy.spatial.distance.cdist(by, by), axis=1)[:, k]  # [:, 0] is the sample itself
        return float((scipy.spatial.distance.cdist(points, by) <= radii).any(axis=1).mean())

    return covered(generated, real), covered(real, generated)


def test_two_folders_by_the_definition(evaluate, tmp_path):
    a, b = save_pngs(tmp_path / "a", 100), save_pngs(tmp_path / "b", 90, seed=1)
    for path in b.iterdir():  # other images, not only other noise
        Image.open(path).point(lambda value: value // 2).save(path)
    folders = ["--pretrained_model_name_or_path", None, "--images", a, "--dataset_name", None, "--reference_images", b]
    folders += ["--split", None, "--num_samples", None, "--num_inference_steps", None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every flag here has an effect
        found = evaluate(*folders)
    expected = plain_frechet(features_of(sorted(a.iterdir())), features_of(sorted(b.iterdir())))
    assert found["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    precision, recall = plain_precision_recall(features_of(sorted(b.iterdir())), features_of(sorted(a.iterdir())))
    assert (found["metrics"]["precision"], found["metrics"]["recall"]) == (precision, recall) and precision < recall
    assert set(found["metrics"]) == {
        *("frechet_distance", "kernel_distance", "kernel_distance_stderr", "precision", "recall")
    }
    assert "cost" not in found and found["protocol"]["samples"]["count"] == 100
    same = evaluate(*folders[:3], b, *folders[4:], output="same")
    assert same["metrics"]["frechet_distance"] < 1e-6 and same["metrics"]["precision"] == 1


def test_samples_give_the_distance_that_training_printed(run, evaluate):
    given = [
        "--validation_feature_extractor",
        CLASSIFIER,
        "--validation_num_samples",
        20,
        "--validation_batch_size",
        8,
    ]
    student = run("train_place", *given, "--validation_split", "test", "--seed", 5)
    printed = [line["frechet_distance"] for line in read_log(student) if "frechet_distance" in line]
    given = ["--scheduler", "DDIMScheduler", "--num_inference_steps", 2, "--seed", 5]
    found = evaluate("--pretrained_model_name_or_path", student, *given)
    assert found["metrics"]["frechet_distance"] == pytest.approx(printed[-1], rel=1e-9)


def test_what_is_written(evaluate, tmp_path, teacher_dir, capsys):
    found = evaluate("--metrics", *LISTED, "--compare_to", teacher_dir)
    printed = capsys.readouterr().out
    protocol = found["protocol"]
    samples, reference = protocol["samples"], protocol["reference"]
    assert samples["count"] == 20 and samples["scheduler"] == "DDPMScheduler" and samples["num_inference_steps"] == 3
    assert set(samples["model_files"]) == {
        *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"),
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert reference["count"] == 24 and reference["split"] == "test" and reference["resolution"] == 8
    assert len(reference["sha256"]) == 64 and len(reference["fingerprint"]) == 16
    assert protocol["extractor"]["dimensions"] == 64 and {"torch", "diffusers", "pillow"} <= set(protocol["versions"])
    assert found["ratios"]["parameters"] == 1 and found["ratios"]["macs_per_image"] == 1
    assert found["cost"]["timed_images"] == 12  # 20, without the first block
    assert any("rank of at most 19" in text for text in found["warnings"]) and "rank of at most 19" in printed
    assert protocol["kid_subset_size"] == 10 and not any("subsets" in text for text in found["warnings"])
    for key, value in found["metrics"].items():  # the other is the same pipeline: the same protocol, number and noise
        assert printed.count(f"{value:>22.6g}{value:>22.6g}\n") and found["compare_to_metrics"][key] == value
    assert "Saved:" in printed and "Next:" in printed and "FID" not in printed  # no FID without inception
    names = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    assert names == ["metrics.json", "report.html", "samples.png"]  # the samples are gone
    assert f"Report: {tmp_path / 'evaluation' / 'report.html'}\n" in printed
    assert check_alone(Page(tmp_path / "evaluation" / "report.html")) == 1
    grid = np.asarray(Image.open(tmp_path / "evaluation" / "samples.png"))
    height, width = grid.shape[:2]  # 8 pictures of the other pipeline above those of this one, labels on the left
    above, below = (grid[height - bottom : height - bottom + 64, width - 8 * 68 :] for bottom in (144, 76))
    assert width > 8 * 68 and height > 144 and (above == below).all() and above.std() > 10


def test_samples_are_shown_as_they_were_drawn(evaluate, tmp_path, teacher_dir):
    """Those of both pipelines, whatever size they are measured at."""
    given = ["--num_samples", 8, "--metrics", "fid", "--compare_to", teacher_dir]
    evaluate(*given, "--resolution", 6, "--keep_images")
    grid = np.asarray(Image.open(tmp_path / "evaluation" / "samples.png"))
    paths = sorted((tmp_path / "evaluation" / "images").iterdir())
    drawn = [np.asarray(Image.open(path)).repeat(8, 0).repeat(8, 1) for path in paths]
    height, width = grid.shape[:2]
    for bottom in (144, 76):  # of the row of --compare_to, here the same pipeline, and of that below it
        line = grid[height - bottom : height - bottom + 64, width - 8 * 68 :]
        for i, image in enumerate(drawn):
            assert (line[:, 68 * i : 68 * i + 64].reshape(64, 64, -1) == image[..., None]).all(), (bottom, i)


def test_a_few_samples_of_another_pipeline_tell_its_cost_alone(evaluate, teacher_dir, tmp_path):
    given = ["--num_samples", 8, "--metrics", "fid", "--compare_to", teacher_dir]
    found = evaluate(*given, "--compare_num_samples", 5)
    assert "compare_to_metrics" not in found and found["ratios"]["parameters"] == 1
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == [
        *("metrics.json", "report.html", "samples.png")
    ]


def test_another_pipeline_is_measured_as_by_itself(evaluate, run, teacher_dir):
    student = run("train_place", "--max_train_steps", 1)
    given = ["--num_samples", 12, "--metrics", *LISTED]
    found = evaluate(*given, "--pretrained_model_name_or_path", student, "--compare_to", teacher_dir, output="both")
    alone = evaluate(*given, output="alone")["metrics"]
    assert found["compare_to_metrics"] == alone != found["metrics"]


def test_blocks_and_images_do_not_depend_on_other_metrics_or_the_count(evaluate, tmp_path):
    evaluate("--keep_images", "--num_samples", 20, output="few")
    evaluate("--keep_images", "--num_samples", 32, "--metrics", "fid", output="many")
    for index in range(16):  # the last block of the first is shorter, its last bits may be others
        names = [tmp_path / folder / "images" / f"{index:06d}.png" for folder in ("few", "many")]
        assert names[0].read_bytes() == names[1].read_bytes()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "few" / "images").iterdir()}
    again = evaluate("--keep_images", "--num_samples", 32, "--metrics", "fid", output="few")
    moved = [path.name for path, when in written.items() if path.stat().st_mtime_ns != when]
    assert sorted(moved) == [f"{index:06d}.png" for index in range(16, 20)]  # only the block that was short
    many = json.loads((tmp_path / "many" / "metrics.json").read_text())
    assert again["metrics"] == many["metrics"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "few" / "images").iterdir()}
    evaluate("--keep_images", "--num_samples", 20, "--metrics", "fid", output="few")  # and back: it is short again
    moved = [path.name for path, when in written.items() if path.stat().st_mtime_ns != when]
    assert sorted(moved) == [f"{index:06d}.png" for index in range(16, 20)]


@pytest.mark.slow
def test_two_processes_give_the_same_images_and_numbers(evaluate, flags, python, tmp_path):
    # 44 samples: three blocks of 16, 16 and 12, so that one process has two; a cache of their own
    common = ["--num_samples", 44, "--batch_size", 16, "--metrics", *LISTED, "--keep_images"]
    one = evaluate(*common, "--reference_cache_dir", tmp_path / "cache-1", output="one")
    arguments = flags(*common, "--reference_cache_dir", tmp_path / "cache-2", output="two")
    ranks = python.start_ranks(2, "evaluate_fid.py", *arguments, ACCELERATE_USE_CPU="true")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (one["protocol"]["processes"], two["protocol"]["processes"]) == (1, 2)
    assert "Saved:" in ranks[0].stdout and "Saved:" not in ranks[1].stdout
    names = [f"{index:06d}.png" for index in range(44)]
    assert sorted(path.name for path in (tmp_path / "two" / "images").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / "images" / name).read_bytes() == (tmp_path / "two" / "images" / name).read_bytes()
    for key, value in one["metrics"].items():
        assert two["metrics"][key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    features = [next((tmp_path / f"cache-{i}").glob("*.npy")).read_bytes() for i in (1, 2)]
    assert features[0] == features[1]
    assert two["cost"]["timed_images"] == 12  # the first block of either process warms it up


def test_threads_give_the_same_images_and_numbers(evaluate, tmp_path):
    common = ["--num_samples", 44, "--batch_size", 4, "--metrics", *LISTED, "--keep_images"]
    found = [
        evaluate(
            *(*common, "--num_cpu_threads", threads, "--reference_cache_dir", tmp_path / f"cache-{threads}"),
            output=f"{threads}",
        )
        for threads in (1, 3)
    ]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert [each["protocol"]["threads_per_process"] for each in found] == [1, 3]
    for index in range(44):
        one, three = (tmp_path / folder / "images" / f"{index:06d}.png" for folder in "13")
        assert one.read_bytes() == three.read_bytes()


def test_processes_that_do_not_know_of_each_other_are_refused(evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun on the CPU without ACCELERATE_USE_CPU: two times one process
    with pytest.raises(ValueError, match="2 processes were launched.*sees 1.*ACCELERATE_USE_CPU=true"):
        evaluate()
    assert not (tmp_path / "evaluation").exists()


def test_a_killed_run_goes_on(evaluate, flags, python, tmp_path):
    common = ["--num_samples", 40, "--batch_size", 4, "--num_inference_steps", 20]
    whole = evaluate(*common, output="whole")
    process = python.start("evaluate_fid.py", *flags(*common, output="killed"))
    records, images = (tmp_path / "killed" / name for name in ("sampling", "images"))
    deadline = time.monotonic() + 200
    while len(list(records.glob("block-*.json"))) < 3:
        assert process.poll() is None, process.stderr[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in records.glob("block-*.json")}
    assert 3 <= len(done) < 10 and not (tmp_path / "killed" / "metrics.json").exists()
    with pytest.raises(
        ValueError, match="holds samples that were made otherwise.*seed: 0 -> 1.*--overwrite_output_dir"
    ):
        evaluate(*common, "--seed", 1, output="killed")
    (images / ".000003.png").write_bytes(b"half a fi")  # what a kill may leave
    found = evaluate(*common, "--keep_images", output="killed")
    assert found["metrics"] == whole["metrics"]  # to the last bit
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())  # nothing was drawn twice
    assert len(list(images.iterdir())) == 40 and found["cost"]["timed_images"] >= 32


def test_an_image_that_is_missing_is_drawn_again(evaluate, tmp_path):
    whole = evaluate("--keep_images")
    (tmp_path / "evaluation" / "images" / "000009.png").unlink()
    (tmp_path / "evaluation" / "sampling" / "block-000000.json").write_text("")  # a crash of the machine
    (tmp_path / "evaluation" / "images" / ".ipynb_checkpoints").mkdir()  # of an editor that looked in
    assert evaluate("--keep_images")["metrics"] == whole["metrics"]
    (tmp_path / "evaluation" / "sampling" / "protocol.json").write_text("")
    assert evaluate("--keep_images")["metrics"] == whole["metrics"]


def test_what_cannot_be_cached_is_measured_all_the_same(evaluate, tmp_path):
    whole = evaluate()
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="--reference_cache_dir cannot be written"):
        assert evaluate("--reference_cache_dir", tmp_path / "file", output="again")["metrics"] == whole["metrics"]


def test_images_are_read_as_training_reads_them(tmp_path):
    """In order of their numbers, and upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    for name in ("10", "2", "1"):
        Image.fromarray(pixels + int(name)).save(tmp_path / f"{name}.png", exif=exif.tobytes())
    (tmp_path / "3.png").mkdir()
    paths = image_files(str(tmp_path), "--images")
    assert [Path(path).name for path in paths] == ["1.png", "2.png", "10.png"]
    read = ImageSet.from_files(paths, "--images")
    assert read.keep_size(quiet=True) == (6, 8)
    upright = np.rot90(pixels + 2, -1).copy()
    assert torch.equal(read.__getitems__([1])[0].permute(1, 2, 0), torch.from_numpy(upright))


@pytest.mark.filterwarnings("ignore:.*no effect here", "ignore:there are transparent", "ignore:.*used alike")
def test_a_folder_measured_against_itself(evaluate, tmp_path):
    """Whatever its images are called and however they are stored, and by which flag it is named."""
    folder = save_pngs(tmp_path / "a [b]*", 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    for place, name in enumerate(("steam train.png", "test/eval.png", "train/10.png", "train/9.png", "x.jfif")):
        pixels = np.random.default_rng(place).integers(0, 256, (8, 8, 4), dtype=np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name, "PNG", exif=exif.tobytes())
    for flag in ("--reference_images", "--train_data_dir"):
        found = evaluate(*NO_PIPELINE, "--images", folder, *NO_DATA, flag, folder, "--metrics", "fid", output=flag)
        assert found["protocol"]["samples"]["count"] == found["protocol"]["reference"]["count"] == 17
        assert abs(found["metrics"]["frechet_distance"]) < 1e-6, flag


@pytest.mark.filterwarnings("ignore:.*no effect here")
def test_images_that_cannot_be_decoded_are_left_out_on_request(evaluate, tmp_path):
    folder = save_pngs(tmp_path / "images", 12)
    (folder / "001.png").write_bytes(b"")
    given = [*NO_PIPELINE, "--images", folder, *NO_DATA, "--reference_images", folder, "--metrics", "fid"]
    with pytest.warns(
        UserWarning, match=r"--images: .* left out: 1 of 12 images, the last is image 1 \(.*001.png\): "
    ):
        found = evaluate(*given, "--skip_bad_images")
    assert found["protocol"]["samples"]["count"] == found["protocol"]["reference"]["count"] == 11
    assert abs(found["metrics"]["frechet_distance"]) < 1e-6
    images = ImageSet.from_files(sorted(folder.iterdir()), "--images")
    with pytest.warns(UserWarning, match="left out"):
        images.leave_out_unreadable(quiet=True)
    assert images.numbers == [0, *range(2, 12)]  # of the prompts that they go with
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="--images: cannot be decoded: 11 of 11 images.* image 11 .* at least 2"):
        images.leave_out_unreadable(quiet=True)


def test_captions_that_are_missing_are_empty_prompts():
    import datasets

    from utils.evaluation.conditions import read_prompts

    args = type("Args", (), {"caption_column": "text", "prompts": None})
    for captions in ([None, "", "a"], [[], [""], ["a", "b"]], [None, [], ["a"]], [[None], None, ["a"]]):
        rows = datasets.Dataset.from_dict({"text": captions})
        assert read_prompts(args, type("Reference", (), {"rows": rows})) == ["", "", "a"]


def test_sizes_that_differ_are_said(evaluate, tmp_path):
    save_pngs(tmp_path / "larger", 20, side=12)
    with pytest.warns(UserWarning, match="the samples are 8x8, --reference_images 12x12"):
        evaluate(*NO_DATA, "--reference_images", tmp_path / "larger")
    save_pngs(tmp_path / "few", 20)
    with pytest.warns(UserWarning, match="few has 20 images, not 30"):
        evaluate(*NO_PIPELINE[:2], "--images", tmp_path / "few", "--num_samples", 30, output="few-evaluated")


def test_samples_of_another_size_than_told(evaluate, monkeypatch):
    monkeypatch.setattr(evaluate_fid.Sampler, "size", lambda self: (4, 4))  # a pipeline that is not understood
    with pytest.raises(ValueError, match="--resolution: the samples are 8x8, not 4x4"):
        evaluate()


@pytest.mark.parametrize(
    "changed",
    [
        ["--batch_size", 4],
        ["--num_inference_steps", 4],
        ["--scheduler", "DDIMScheduler"],
        ["--clip_sample", "false"],
        ["--dtype", "bf16"],
        ["--pretrained_model_name_or_path", "other"],
    ],
    ids=lambda flags: flags[0],
)
def test_samples_of_another_protocol_are_not_mixed(evaluate, tmp_path, teacher_dir, changed):
    first = evaluate("--keep_images", "--metrics", "fid")
    other = shutil.copytree(teacher_dir, tmp_path / "other")
    pipeline = DDPMPipeline.from_pretrained(other)
    pipeline.unet.conv_out.bias.data += 0.5
    pipeline.save_pretrained(other)  # equal but for its weights
    changed = [str(other) if word == "other" else word for word in changed]
    with pytest.raises(ValueError, match="made otherwise"):
        evaluate(*changed, "--metrics", "fid")
    (tmp_path / "evaluation" / "notes.txt").write_text("mine")
    again = evaluate(*changed, "--metrics", "fid", "--overwrite_output_dir")
    assert again["metrics"] != first["metrics"]
    assert (tmp_path / "evaluation" / "notes.txt").read_text() == "mine"  # only an evaluation's own files go


OTHER_REFERENCES = [
    ["--max_reference_samples", 20],
    ["--resolution", 6],
    ["--batch_size", 6],
    ["--crop", 0, 0, 6, 6],
    ["--resolution", 6, "--image_interpolation_mode", "bicubic"],
]


@pytest.mark.slow
def test_the_reference_is_cached_by_content_and_protocol(evaluate, tmp_path, capsys):
    data, cache = save_images(tmp_path / "data"), tmp_path / "cache"
    common = ["--dataset_name", data, "--reference_cache_dir", cache]
    first = evaluate(*common, output="1")
    assert "from the cache" not in capsys.readouterr().out
    assert evaluate(*common, output="2")["metrics"] == first["metrics"]
    assert "from the cache" in capsys.readouterr().out
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)  # the same content elsewhere
    evaluate("--dataset_name", moved, "--reference_cache_dir", cache, output="3")
    assert "from the cache" in capsys.readouterr().out
    for number, other in enumerate(OTHER_REFERENCES):
        evaluate(*common, *other, output=f"other-{number}")
        assert "from the cache" not in capsys.readouterr().out, other
    shutil.rmtree(data)
    save_images(data, seed=1)
    assert evaluate(*common, output="4")["metrics"] != first["metrics"]
    assert "from the cache" not in capsys.readouterr().out
    for path in cache.glob("*.npy"):
        np.save(path, np.load(path)[:5])
    with pytest.warns(UserWarning, match="cache is damaged .5 features of 24"):
        evaluate("--dataset_name", moved, "--reference_cache_dir", cache, output="short")
    for path in cache.glob("*.npy"):
        path.write_bytes(b"PK\3\4")  # which NumPy takes for a zip file
    with pytest.warns(UserWarning, match="cache is damaged"):
        evaluate("--dataset_name", moved, "--reference_cache_dir", cache, output="5")
    assert not list(cache.glob(".*"))


@pytest.fixture(scope="module")
def other_extractor(tmp_path_factory) -> str:
    """Another image model of 64 features."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 64], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_statistics_in_place_of_images(evaluate, tmp_path, other_extractor):
    file = tmp_path / "statistics.npz"
    whole = evaluate("--save_stats", file)
    given = ["--dataset_name", None, "--split", None, "--kid_subset_size", None, "--reference_stats"]
    found = evaluate(*given, file, output="again")
    assert found["metrics"] == {"frechet_distance": whole["metrics"]["frechet_distance"]}  # fid alone is the default
    assert found["protocol"]["reference"]["made_with"]["reference"]["count"] == 24
    with pytest.raises(ValueError, match="--reference_stats .* is of the features of classifier, not"):
        evaluate(*given, file, "--feature_extractor", other_extractor, output="other")
    with pytest.raises(ValueError, match="--metrics kid needs the features"):
        evaluate(*given, file, "--metrics", "fid", "kid", output="kid")

    statistics = FeatureStatistics.load(file)  # the same as clean-fid writes them
    np.savez(tmp_path / "cleanfid.npz", mu=statistics.mean, sigma=statistics.cov)
    with pytest.warns(UserWarning, match="does not say what it is of"):
        found = evaluate(*given, tmp_path / "cleanfid.npz", output="cleanfid")
    assert found["metrics"]["frechet_distance"] == pytest.approx(whole["metrics"]["frechet_distance"], rel=1e-9)
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="2048 features.*gives 64.*another extractor"):
        evaluate(*given, tmp_path / "inception.npz", output="dims")
    (tmp_path / "broken.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="--reference_stats: .*broken.npz does not hold feature statistics"):
        evaluate(*given, tmp_path / "broken.npz", output="broken")


NO_DATA = ["--dataset_name", None, "--split", None]
NO_PIPELINE = ["--pretrained_model_name_or_path", None, "--num_inference_steps", None, "--num_samples", None]
BAD = {
    "no reference": (NO_DATA, "one reference to measure against, found none"),
    "two references": (["--reference_images", "images"], "found --dataset_name and --reference_images"),
    "nothing to measure": (NO_PIPELINE, "found neither"),
    "two to measure": (["--images", "images"], "found both"),
    "one sample": (["--num_samples", 1], "--num_samples is 1; statistics need at least 2"),
    "one image": ([*NO_PIPELINE, "--images", "single"], "--images .*: found 1 image files"),
    "one reference": ([*NO_DATA, "--reference_images", "single"], "--reference_images .*: found 1 image files"),
    "no folder": ([*NO_PIPELINE, "--images", "nowhere"], "--images .*no such folder"),
    "mixed sizes": ([*NO_PIPELINE, "--images", "mixed"], "image 0 .*000.png.* and image 3 .*003.png.*--resolution"),
    "mixed reference": ([*NO_DATA, "--reference_images", "mixed"], "--reference_images: .*--resolution"),
    "corrupt": ([*NO_PIPELINE, "--images", "corrupt"], r"image 2 \(.*002.png\) cannot be decoded"),
    "corrupt reference": ([*NO_DATA, "--reference_images", "corrupt"], r"image 2 \(.*002.png\) cannot be decoded"),
    "cut off": ([*NO_DATA, "--reference_images", "truncated"], r"image 2 \(.*002.png\) cannot be decoded"),
    "corrupt row": (["--dataset_name", "rows"], r"--dataset_name: image 4 \(.*\) cannot be decoded"),
    "unknown metric": (
        ["--metrics", "fid", "lpips"],
        "--metrics lpips: there is no such metric.*fid, kid, pr, is, clip",
    ),
    "unknown scheduler": (["--scheduler", "Dream"], "--scheduler Dream is no scheduler of diffusers"),
    "unknown flag": (["--num_sample", 5], "did you mean --num_samples"),
    "no extractor": (["--feature_extractor", "nowhere"], "--feature_extractor: .*nowhere"),
    "text extractor": (["--feature_extractor", "text"], "--feature_extractor: .*text"),
    "no pipeline": (["--pretrained_model_name_or_path", "images"], "has no model_index.json"),
    "no second pipeline": (["--compare_to", "images"], "--compare_to .*has no model_index.json"),
    "clip without prompts": (["--metrics", "clip"], "--prompts FILE or --caption_column"),
    "no prompts": (["--metrics", "clip", "--prompts", "nowhere"], "--prompts nowhere: no such file"),
    "prompts without effect": (["--prompts", "prompts.txt"], "--prompts has no effect: a DDPMPipeline takes none"),
    "no prompt column": (["--caption_column", "caption"], "--caption_column caption: .*only image, label"),
    "guidance": (["--guidance_scale", 2], "--guidance_scale has no effect"),
    "eta": (["--eta", 0.5], "--eta has no effect"),
    "no clipping": (
        ["--clip_sample", "true", "--scheduler", "PNDMScheduler"],
        "--clip_sample has no effect: a PNDMScheduler does not clip",
    ),
    "box of statistics": (
        [*NO_DATA, "--reference_stats", "x.npz", "--crop", 0, 0, 4, 4],
        "--crop cuts reference images, and statistics are of images as they were",
    ),
    "box of the reference": (
        ["--crop", 0, 0, 4, 9],
        "--dataset_name: image 0 .*--crop 0 0 4 9 goes beyond its 8 rows",
    ),
    "eta range": (["--eta", 2], r"--eta is 2.0; it must lie in \[0, 1\]"),
    "too many steps": (["--num_inference_steps", 2000], "--num_inference_steps 2000"),
    "too few for pr": (["--num_samples", 5], "--metrics pr needs at least 6"),
    "too few for is": (["--num_samples", 8, "--metrics", "is"], "--metrics is needs at least 10"),
    "not empty": (["--output_dir", "images"], "--output_dir .*is not empty.*--overwrite_output_dir"),
    "input in output": ([*NO_PIPELINE, "--images", "images", "--output_dir", "."], "lies in --output_dir"),
    "cleanfid needs inception": ([*NO_DATA, "--cleanfid_stats", "cifar10"], "--cleanfid_stats are of inception"),
    "card of images": ([*NO_PIPELINE, "--images", "images", "--update_model_card"], "--update_model_card writes"),
    "unreadable card": (["--pretrained_model_name_or_path", "carded", "--update_model_card"], "README.md cannot be "),
    "seed": (["--seed", 2**32], "--seed is 4294967296"),
    "statistics nowhere": (["--save_stats", "nowhere/x.npz"], "--save_stats nowhere/x.npz: .*a folder that exists"),
    "output in images": (
        [*NO_PIPELINE, "--images", "images", "--output_dir", "images/new"],
        "--output_dir images/new lies in --images",
    ),
    "foreign images": (["--output_dir", "mine", "--overwrite_output_dir"], "would delete mine/images, which no eval"),
    "bomb": ([*NO_PIPELINE, "--images", "bomb"], r"image 1 \(.*001.png\) cannot be decoded"),
    "prompts that are none": (["--caption_column", "label"], "--caption_column label: found .*int64.* a caption is"),
    "prompt left out": (["--prompts", "gap.txt"], "--prompts gap.txt: line 2 is empty"),
    "random extractor": (["--feature_extractor", "masked"], "masked.* is a ViTMAEModel, whose features .* differ"),
    "video extractor": (["--feature_extractor", "video"], "video.* is a VideoMAEModel, which gives no features"),
    "shapes of the extractor": (["--feature_extractor", "shapes"], "--feature_extractor: .*shapes"),
    "broken processor": (["--feature_extractor", "processor"], "--feature_extractor: .*processor"),
    "index of nothing": (["--pretrained_model_name_or_path", "empty"], "empty does not load"),
    "labels": (["--compare_to", "classes"], "--compare_to classes: the model of this DDPMPipeline needs class labels"),
    "no split": (["--split", "dev"], "--split: .* has no split 'dev', only train, test"),
    "card without folder": (["--update_model_card", "--pretrained_model_name_or_path", "me/x"], "--update_model_card"),
}


def save_carded(folder: Path) -> None:
    tiny_ddpm().save_pretrained(folder / "carded")
    (folder / "carded" / "README.md").write_text("---\nmodel-index: 3\n: [\n---\n")


def save_empty(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "model_index.json").write_text("{}")


def save_classes(folder: Path) -> None:
    DDPMPipeline(build_unet(num_class_embeds=3), DDPMScheduler()).save_pretrained(folder / "classes")


def save_vit(folder: Path, config_class, model_class, **config) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model_class(config_class(**sizes, image_size=16, patch_size=8, **config)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def save_masked(folder: Path) -> None:
    sizes = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    save_vit(folder / "masked", ViTMAEConfig, ViTMAEModel, decoder_intermediate_size=8, **sizes)


def save_video(folder: Path) -> None:
    save_vit(folder / "video", VideoMAEConfig, VideoMAEModel, num_frames=2)


def save_shapes(folder: Path) -> None:
    save_vit(folder / "shapes", ViTConfig, ViTModel)
    config = json.loads((folder / "shapes" / "config.json").read_text())
    (folder / "shapes" / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))


def save_broken_processor(folder: Path) -> None:
    save_vit(folder / "processor", ViTConfig, ViTModel)
    (folder / "processor" / "preprocessor_config.json").write_text("[]")


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_anything_is_drawn(evaluate, tmp_path, monkeypatch, case):
    given, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_fid, "draw_missing", lambda *_: pytest.fail("it was too late"))
    save_pngs(tmp_path / "images", 10)
    save_pngs(tmp_path / "single", 1)
    Image.new("RGB", (8, 9)).save(save_pngs(tmp_path / "mixed", 6) / "003.png")
    (save_pngs(tmp_path / "corrupt", 6) / "002.png").write_bytes(b"no image")
    cut = save_pngs(tmp_path / "truncated", 6, side=32) / "002.png"
    cut.write_bytes(cut.read_bytes()[:900])  # its header is whole
    rows = save_images(tmp_path / "rows")
    if case == "corrupt row":
        import datasets

        file = rows / "data" / "test-00000-of-00001.parquet"
        table = datasets.Dataset.from_parquet(str(file)).cast_column("image", datasets.Image(decode=False))
        damaged = [
            {"bytes": b"no image", "path": "four.png"} if i == 4 else row["image"] for i, row in enumerate(table)
        ]
        table.remove_columns("image").add_column("image", damaged).cast_column("image", datasets.Image()).to_parquet(
            file
        )
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    save_pngs(tmp_path / "mine" / "images", 2)
    if case == "bomb":
        Image.new("L", (300, 300)).save(save_pngs(tmp_path / "bomb", 3) / "001.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    build = {"unreadable card": save_carded, "index of nothing": save_empty, "labels": save_classes}
    build |= {"random extractor": save_masked, "video extractor": save_video}
    build |= {"shapes of the extractor": save_shapes, "broken processor": save_broken_processor}
    if case in build:
        build[case](tmp_path)
    tiny_text()["text_encoder"].save_pretrained(tmp_path / "text")
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=message):
        evaluate(*given)


def test_cleanfid_statistics_that_cannot_be_had(evaluate, monkeypatch):
    import utils.evaluation.reference

    args = type("Args", (), {"cleanfid_stats": "cifar10", "cleanfid_res": 32, "cleanfid_split": "no-such-split"})
    args.fid_mode = "clean"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="--cleanfid_stats cifar10 .*--reference_stats"):
        utils.evaluation.reference._cleanfid_statistics(args)


def test_the_reference_is_cut_and_both_are_resized_as_told(evaluate, tmp_path):
    """Measured against copies that Pillow cut and resized, nothing is left."""
    whole = save_pngs(tmp_path / "whole", 20, side=(16, 24))
    (tmp_path / "done").mkdir()
    for path in whole.iterdir():
        with Image.open(path) as image:
            image.crop((3, 2, 15, 14)).resize((8, 8), Image.Resampling.BICUBIC).save(tmp_path / "done" / path.name)
    given = [*NO_PIPELINE, *NO_DATA, "--metrics", "fid", "--kid_subset_size", None, "--images", tmp_path / "done"]
    given += ["--reference_images", whole, "--crop", 2, 3, 12, 12]
    bicubic = evaluate(*given, "--resolution", 8, "--image_interpolation_mode", "bicubic", output="bicubic")
    assert bicubic["metrics"]["frechet_distance"] < 1e-6
    assert bicubic["protocol"]["reference"]["crop"] == [2, 3, 12, 12]
    assert "Pillow bicubic" in bicubic["protocol"]["reference"]["resize"]
    assert bicubic["protocol"]["samples"]["interpolation"] == "bicubic"
    assert evaluate(*given, "--resolution", 8, output="bilinear")["metrics"]["frechet_distance"] > 1e-3
    with pytest.warns(UserWarning, match="--reference_images 12x12"):  # the box alone, unresized
        assert evaluate(*given, output="unresized")["protocol"]["reference"]["resize"] == "none"


def test_resolution_makes_mixed_sizes_one(evaluate, tmp_path):
    Image.new("RGB", (12, 9)).save(save_pngs(tmp_path / "mixed", 20) / "003.png")
    sizes = ["--resolution", 8, "--kid_subset_size", 1000]
    found = evaluate(*NO_PIPELINE, "--images", tmp_path / "mixed", *sizes)
    assert found["protocol"]["kid_subset_size"] == 20  # what was used
    assert any("hold all 20 samples" in text for text in found["warnings"])
    assert found["protocol"]["samples"]["resolution"] == 8 and found["protocol"]["reference"]["resolution"] == 8


def test_flags_without_effect_are_warned_of(evaluate, tmp_path):
    save_pngs(tmp_path / "images", 20)
    with pytest.warns(UserWarning) as warned:
        evaluate(
            *NO_PIPELINE, "--images", tmp_path / "images", "--eta", 0.5, "--scheduler", "X", "--fid_mode", "clean"
        )
    text = " ".join(str(warning.message) for warning in warned)
    assert "--eta has no effect" in text and "--scheduler has no effect" in text and "--fid_mode" not in text


CARD = """---
license: mit
tags:
- mine
model-index:
- name: old
  results:
  - task:
      type: x
    dataset:
      type: y
      name: y
    metrics:
    - type: accuracy
      value: 0.5
---

# Mine

Text  with ---
"""


def test_the_model_card_gets_the_numbers_once(evaluate, tmp_path, teacher_dir):
    student = Path(shutil.copytree(teacher_dir, tmp_path / "student"))
    (student / "README.md").write_text(CARD)
    given = ["--pretrained_model_name_or_path", student, "--update_model_card"]
    found = evaluate(*given)
    first = (student / "README.md").read_text()
    card = ModelCard.load(student / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {"accuracy", *found["metrics"]} == set(results) and len(card.data.eval_results) == len(results)
    assert results["frechet_distance"].metric_value == found["metrics"]["frechet_distance"]
    assert results["frechet_distance"].dataset_split == "test" and results["accuracy"].metric_value == 0.5
    assert results["frechet_distance"].metric_args["num_samples"] == 20
    assert card.data.license == "mit" and card.data.tags == ["mine"] and card.data.model_name == "old"
    assert first.endswith("---\n\n# Mine\n\nText  with ---\n") and str(tmp_path) not in first
    evaluate(*given, "--overwrite_output_dir")
    assert (student / "README.md").read_text() == first
    for number, other in enumerate((["--seed", 1], ["--dtype", "bf16"])):  # other measurements stand beside it
        evaluate(*given, *other, "--metrics", "fid", output=f"another-{number}")
        assert len(ModelCard.load(student / "README.md").data.eval_results) == len(results) + 1 + number
    pipeline = DDPMPipeline.from_pretrained(student)
    pipeline.unet.conv_out.bias.data += 0.5
    pipeline.save_pretrained(student)
    changed = evaluate(*given, output="changed")["metrics"]["frechet_distance"]  # trained on, measured as before
    values = [r.metric_value for r in ModelCard.load(student / "README.md").data.eval_results]
    assert len(values) == len(results) + 2
    assert changed in values and found["metrics"]["frechet_distance"] not in values


def test_the_card_of_a_training_run_gets_the_numbers_once(run, evaluate):
    student = run("train_place", "--max_train_steps", "1")
    given = ["--pretrained_model_name_or_path", student, "--update_model_card"]
    found = evaluate(*given)
    for output in ("evaluation", "again"):
        results = ModelCard.load(student / "README.md").data.eval_results
        wanted = sorted(found["metrics"].keys() - {"kernel_distance_stderr"})  # an error stands beside its number
        assert sorted(result.metric_type for result in results) == wanted, output
        evaluate(*given, "--overwrite_output_dir", output="again")
    assert DDPMPipeline.from_pretrained(student) is not None


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": 5, "max_position_embeddings": 77}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    tiny_text()["tokenizer"].save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_a_text_to_image_pipeline_and_its_clip_score(evaluate, tmp_path, clip_dir):
    import datasets

    tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
    prompts = ["a b", "c", "b a", "a"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 16, 3), dtype=np.uint8)
    rows = {"image": list(pixels), "caption": [prompts[i % 4] for i in range(12)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "captioned" / "data").mkdir(parents=True)
    file = tmp_path / "captioned" / "data" / "test-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    common = ["--pretrained_model_name_or_path", tmp_path / "sd", "--dataset_name", tmp_path / "captioned"]
    common += ["--num_samples", 10, "--metrics", "fid", "clip", "--clip_model", clip_dir, "--guidance_scale", 4]
    by_file = evaluate(*common, "--prompts", tmp_path / "prompts.txt", "--keep_images", output="file")
    by_column = evaluate(*common, "--caption_column", "caption", output="column")
    assert by_file["metrics"] == by_column["metrics"]
    assert by_file["protocol"]["samples"]["guidance_scale"] == 4 and by_file["cost"]["forwards_per_image"] >= 6

    from utils.metrics.clip import ClipScorer

    paths = sorted((tmp_path / "file" / "images").iterdir())
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    cosines = ClipScorer(clip_dir)(images, [prompts[i % 4] for i in range(10)])
    assert by_file["metrics"]["clip_score"] == pytest.approx(cosines.double().clamp(min=0).mean().item(), abs=1e-6)


def test_every_metric_has_a_least_number_of_samples():
    assert set(METRICS) == {"fid", "kid", "pr", "is", "clip"}
    assert METRICS["pr"] == 6
