# SPDX-License-Identifier: Apache-2.0
"""`report.html`: whole, alone, true to the files it is made of, and safe whatever they are called."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from test_card import EVERYTHING

import train_place
from utils.files import sha256, write_json
from utils.publishing.html_report import LARGEST_PNG, picture, report_measurement, write_report
from utils.training.arguments import parse_args

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NASTY = """</script><script>alert("x")</script><img src=http://x.org/y> '&amp; """  # of a folder's name or a prompt
EVALUATION, ANALYSIS = ("metrics.json", "samples.png"), ("analysis.json", "coarse_fine.png", "error_maps.png")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.sources, self.tags, self.open = "", [], set(), []
        self.feed(path.read_text())
        self.close()
        assert self.open == [], "tags are left open"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def save_picture(path: Path, size=(300, 80), color=90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, color)
    ImageDraw.Draw(image).text((5, 5), path.stem, fill=255)
    image.save(path)


@pytest.fixture
def student(tmp_path) -> Path:
    """What a training run leaves of what the page shows."""
    folder = tmp_path / "my student"
    data = tmp_path / "data of <me>"
    argv = ["--pretrained_model_name_or_path", "assets/teacher", "--dataset_name", str(data), "--pruning_ratio", "0.5"]
    argv += ["--validation_feature_extractor", "assets/classifier", "--validation_num_samples", "64"]
    args = vars(parse_args("", train_place.add_method_arguments, [*argv, "--output_dir", str(folder)]))
    args["validation_prompts"] = [NASTY]
    (folder / "unet").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"weights")
    write_json(folder / "args.json", {"script": "train_place.py", "arguments": args, "versions": {"torch": "2.9"}})
    facts = {
        **{
            "method": "PLACE",
            "sizes": "SIZES <of> tensors",
            "sampler": "DDIM, eta 0",
            "distances": {"student": 12.345},
        },
        "size": {"teacher": {"parameters": 2000, "macs": 3000000}, "student": {"parameters": 500, "macs": 1000}},
    }
    write_json(folder / "card.json", facts)
    lines = [{"step": step, "frechet_distance": 100.0 + step} for step in range(1, 31)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("samples.png", "losses.png", *(f"samples/step-{step:07d}.png" for step in (1, 30))):
        save_picture(folder / name)
    return folder


def measurements(folder: Path, student: Path) -> tuple[Path, Path]:
    """What evaluate_fid.py and analyze_error.py leave."""
    evaluation, analysis = folder / "evaluation", folder / "analysis"
    for name in (evaluation / "samples.png", *(analysis / name for name in ANALYSIS[1:])):
        save_picture(name)
    content = json.loads(json.dumps(EVERYTHING))
    content["protocol"]["samples"]["model_files"] = {WEIGHTS: sha256(student / WEIGHTS)}
    write_json(evaluation / "metrics.json", content)
    error = {"total": 0.0459, "coarse_share": 0.104, "groups": {"coarse_share": 0.3}}
    samples = {"num_samples": 8, "pixel_difference_to_teacher": {"student": 82.78, "teacher": 0.0}}
    samples |= {"frechet_distance": {"student": 44.44, "teacher": 5.5}, "num_real_images": 99, "warning": "TOO FEW"}
    write_json(
        analysis / "analysis.json",
        {
            "protocol": {
                "student_sha256": {WEIGHTS: sha256(student / WEIGHTS)},
                "arguments": {"pretrained_model_name_or_path": "/models/teacher", "num_images": 32, "seed": 0},
                **{"group_size": 16, "place_name": "place", "sampler": {"name": "DDIM, eta 0", "steps": 25}},
            },
            **{"mean": error, "places": [1, 2, 3], "samples": {**samples, "extractor": {"name": "classifier"}}},
        },
    )
    return evaluation, analysis


def check_alone(page: Page) -> int:
    """Nothing is fetched and nothing runs; the number of its pictures."""
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert page.sources and all(source.startswith(("data:image/", "#")) for source in page.sources)
    return len([source for source in page.sources if source[0] == "d"])


def test_the_page_of_a_run_is_alone_and_names_no_folder(student, tmp_path):
    page = Page(write_report(student))
    assert check_alone(page) == 4
    assert str(tmp_path) not in (student / "report.html").read_text()  # paths are cut as in the card
    for words in ("my student", "Distilled from assets/teacher with PLACE", "data of <me>", "SIZES <of> tensors"):
        assert words in page.text
    assert '</script><script>alert("x")</script>' in page.text  # a flag's value: words, not markup
    assert "Step 1, Frechet distance 101" in page.text and "Step 30, Frechet distance 130" in page.text
    assert "64 samples (DDIM, eta 0" in page.text and "12.3" in page.text
    assert "2,000" in page.text and "0.25" in page.text and "--pruning_ratio 0.5" in page.text
    assert "not measured yet" in page.text and "Where the error lies" not in page.text


def test_of_many_grids_some_are_shown(student):
    for step in range(1, 31):
        save_picture(student / "samples" / f"step-{step:07d}.png")
    page = Page(write_report(student))
    shown = [int(line.split()[1].rstrip(",")) for line in page.text.splitlines() if line.startswith("Step ")]
    assert len(shown) == 12 and (shown[0], shown[-1]) == (1, 30) and shown == sorted(set(shown))
    assert "12 of 30 validations" in page.text


def test_measurements_join_the_page_of_their_student(student, tmp_path):
    evaluation, analysis = measurements(tmp_path, student)
    assert report_measurement(str(student), evaluation, "evaluation", EVALUATION) == student / "report.html"
    assert report_measurement(str(student), analysis, "analysis", ANALYSIS) == student / "report.html"
    shutil.rmtree(evaluation)  # the page needs them no more
    shutil.rmtree(analysis)
    page = Page(write_report(student))
    assert check_alone(page) == 7
    text = " ".join(page.text.split())
    assert "12.35" in text and "50,000 samples (DPMSolverMultistepScheduler, 1,000 steps" in text
    assert "0.0123 s" in text and "cuda" in text and "not measured yet" not in text
    assert "at 3 places: a mean" in text and "timestep" not in text.split("Where the error")[1].split("Flags")[0]
    assert "10.4% of it" in text and "against 99 real images on the features of classifier" in text
    assert "44.4" in text and "TOO FEW" in text and "few samples." in text
    assert text.count("parameters of the denoiser") == 1 and "/models" not in text

    (student / WEIGHTS).write_bytes(b"others")  # the run has gone on
    text = Page(write_report(student)).text
    assert "12.35" not in text and "44.4" not in text and "12.3" in text


def test_what_is_measured_of_another_model_has_a_page_of_its_own(student, tmp_path):
    evaluation, analysis = measurements(tmp_path, student)
    before = sorted(student.rglob("*"))
    for model in (None, "google/ddpm-x", str(tmp_path)):
        assert report_measurement(model, evaluation, "evaluation", EVALUATION) == evaluation / "report.html"
    assert report_measurement("google/x", analysis, "analysis", ANALYSIS) == analysis / "report.html"
    page, other = Page(evaluation / "report.html"), Page(analysis / "report.html")
    assert "12.35" in page.text and "Flags" not in page.text and "44.4" in other.text
    assert sorted(student.rglob("*")) == before


def test_what_is_not_there_is_left_out(student, tmp_path):
    """No validation, a picture cut off by a full disk, an analysis that was stopped."""
    shutil.rmtree(student / "samples")
    (student / "samples.png").unlink()
    (student / "losses.png").write_bytes((student / "losses.png").read_bytes()[:60])
    facts = json.loads((student / "card.json").read_text())
    write_json(student / "card.json", {**facts, "distances": {}, "size": {"student": {"parameters": 5, "macs": None}}})
    _, analysis = measurements(tmp_path, student)
    content = json.loads((analysis / "analysis.json").read_text())
    del content["samples"]
    write_json(analysis / "analysis.json", content)
    report_measurement(str(student), analysis, "analysis", ANALYSIS)
    text = Page(student / "report.html").text
    assert "No samples were drawn" in text and "None is measured yet" in text and "Where the error" not in text


def test_a_large_picture_is_shrunk(tmp_path):
    Image.effect_noise((2000, 1000), 200).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 2 * LARGEST_PNG
    found = picture(tmp_path / "large.png")
    assert found.startswith("data:image/jpeg;base64,") and len(found) < 1.2e6


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it_without_a_network(student, tmp_path, width):
    """With no name that can be resolved; nothing is wider than the window."""
    report_measurement(str(student), measurements(tmp_path, student)[0], "evaluation", EVALUATION)
    page = report_measurement(str(student), tmp_path / "analysis", "analysis", ANALYSIS)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --host-resolver-rules=MAP\x00*\x00~NOTFOUND"
    flags += f" --user-data-dir={tmp_path / 'profile'} --window-size={width},3000"
    words = [CHROMIUM, *(word.replace("\x00", " ") for word in flags.split(" "))]
    subprocess.run([*words, f"--screenshot={tmp_path / 'seen.png'}", page.as_uri()], check=True, timeout=300)
    seen = Image.open(tmp_path / "seen.png").convert("L")
    assert seen.size == (width, 3000)
    background = seen.getpixel((2, 2))
    drawn = seen.point(lambda value: 255 * (abs(value - background) > 40)).getbbox()
    assert drawn[1] < 100 and drawn[3] > 1000 and drawn[0] > 5 and drawn[2] < width - 5  # margins left and right
