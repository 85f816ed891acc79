# SPDX-License-Identifier: Apache-2.0
"""The recipes against the paper's numbers, and every command of the documentation against the parsers."""

import itertools
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMPipeline, DiTTransformer2DModel, SD3Transformer2DModel, UNet2DModel

import analyze_error
import evaluate_fid
import train_lift
import train_place
import utils.analysis.arguments
import utils.evaluation.arguments
import utils.publishing.hub
from benchmarks.published import SD3_MEDIUM, configs_of
from utils.backbones.loading import read_json_config
from utils.distillation.losses import output_loss
from utils.students.depth import depth_config, even_layers
from utils.students.sizes import full_config, model_size, paper_parameters
from utils.training.arguments import parse_args

ROOT = Path(__file__).resolve().parent.parent
TRAIN = {"train_lift.py": train_lift, "train_place.py": train_place}
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


class Row(NamedTuple):
    """What the paper and the authors' code say of a row, but for what the note says is ours."""

    student: float | str | range  # pruning ratio, preset, or layers kept
    steps: int
    rate: float
    images: int  # a step
    feature: float  # weight in the per-element form
    ema: float
    decay: float
    elements: (
        int | None
    )  # that the loss sums over where its gradient is clipped at 1; None: means are clipped, or none
    clip: float
    dropout: float | None
    paper: float  # millions of parameters
    ours: float
    fid: float | None


# arXiv 2605.19729, tables of CelebA, LSUN Bedroom and LAION, and the configurations in the authors' repository. Of
# CIFAR-10 its configuration alone; ratio, steps and sizes are ours. The Bedroom batch is one of three.
# The DiT rows: train_masked_kd.py and diffusion/gaussian_diffusion.py there; sizes as papers count them.
CELEBA, BEDROOM, STABLE = 3 * 64 * 64, 3 * 256 * 256, (50_000, 5e-5, 128, 1.0, 0.9999, 1e-2, None, 1.0, None)
DIT = (0.9999, 0, None, 1.0, None)
PAPER = {
    "ddpm_celeba64_place_50": Row(0.5, 200_000, 2e-4, 96, 4.7e-5, 0.9999, 0, CELEBA, 1, 0.1, 19.7, 19.7, 4.93),
    "ddpm_celeba64_place_70": Row(0.7, 240_000, 2e-4, 96, 4.7e-5, 0.9999, 0, CELEBA, 1, 0.1, 9.2, 9.4, 5.97),
    "ddpm_celeba64_place_90": Row(0.9, 500_000, 2e-4, 96, 4.7e-5, 0.9999, 0, CELEBA, 1, 0.1, 1.3, 1.3, 15.73),
    "ddpm_bedroom256_place_30": Row(0.3, 200_000, 2e-5, 16, 3.0e-5, 0.999, 0, BEDROOM, 0, None, 63.2, 64.0, 16.57),
    "ddpm_bedroom256_place_50": Row(0.5, 500_000, 2e-5, 16, 3.0e-5, 0.999, 0, BEDROOM, 0, None, 28.5, 28.4, 30.49),
    "ddpm_bedroom256_place_70": Row(0.7, 700_000, 2e-5, 16, 3.0e-5, 0.999, 0, BEDROOM, 0, None, 12.6, 13.1, 37.96),
    "ddpm_cifar10_place": Row(0.7, 200_000, 2e-4, 128, 6.6e-5, 0.9999, 0, 3 * 32 * 32, 1, 0.1, 5.5, 5.5, None),
    "sd21_bk_base": Row("bk_base", *STABLE, 583.5, 583.5, 16.72),
    "sd21_bk_small": Row("bk_small", *STABLE, 485.8, 485.8, 14.65),
    "sd21_bk_tiny": Row("bk_tiny", *STABLE, 326.8, 326.8, 14.60),
    "dit_xl2_d14": Row(range(1, 28, 2), 500_000, 2e-4, 256, 7.142857e-4, *DIT, 340.5, 340.5, 2.79),
    "dit_xl2_d7": Row(range(3, 28, 4), 500_000, 2e-4, 256, 1.428571e-3, *DIT, 173.1, 173.1, 5.91),
    "dit_xl2_d4": Row(range(1, 28, 7), 500_000, 2e-4, 256, 2.5e-3, *DIT, 101.4, 101.4, 21.17),
}
SPEED = 34e12  # operations a second, see docs/paper.md


def parse(words: list[str], script: str = "train_place.py", *, idle: bool = False):
    """The command line, checked, without an idle flag in it, but where one may be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if idle else "error")
        return parse_args(TRAIN[script].__doc__, TRAIN[script].add_method_arguments, words)


@pytest.fixture(scope="module")
def recipes() -> dict:
    return {name: parse([f"@recipes/{name}.args"]) for name in PAPER}


def heads(name: str) -> list[str]:
    """The comment at the head of a recipe, as one line, and of those that it includes."""
    text = (ROOT / "recipes" / f"{name}.args").read_text()
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.split("\n"))
    others = re.findall(r"^@recipes/([\w/]+)\.args", text, flags=re.MULTILINE)
    return [" ".join(line.removeprefix("# ") for line in lines), *(each for other in others for each in heads(other))]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_papers_numbers(recipes, name):
    args, row = recipes[name], PAPER[name]
    is_dit = isinstance(row.student, range)
    assert (
        list(row.student) == args.kept_layers if is_dit else row.student in (args.pruning_ratio, args.student_preset)
    )
    assert (args.max_train_steps, args.learning_rate) == (row.steps, row.rate)
    assert (args.lr_scheduler, args.learning_rate * args.min_lr_rate) == (
        ("cosine", 1e-4) if is_dit else ("constant", 0)
    )
    assert args.train_batch_size * args.gradient_accumulation_steps == row.images
    assert (args.lambda_task, args.lambda_kd_output) == ((0.1, 0.9) if is_dit else (1, 1))
    assert args.lambda_kd_feat == row.feature
    assert (args.feature_weighting, args.feature_mask_sigma) == (("linear", 2) if is_dit else ("constant", 0))
    assert (args.group_size, args.grouping, args.weighting) == (16, "error", "adaptive")
    assert args.coarse_norm == ("l2" if is_dit else "l1")
    assert (args.use_ema, args.ema_decay) == (True, row.ema)
    assert args.adam_weight_decay == row.decay and args.dropout == row.dropout
    assert (args.adam_beta1, args.adam_beta2, args.coarse_scale) == (0.9, 0.999, 1)
    if is_dit:
        assert args.lambda_kd_feat * len(args.kept_layers) == pytest.approx(1e-2, rel=1e-6)  # theirs is a mean
        assert (args.optimizer, args.mixed_precision, args.proportion_empty_prompts) == ("adamw", "fp16", 0.1)
        assert (args.max_grad_norm, args.adam_epsilon, args.resolution) == (row.clip, 1e-8, None)
        assert (args.validation_guidance_scale, args.validation_guidance_channels) == (1.5, 3)
    elif row.elements is None:
        assert (args.optimizer, args.mixed_precision, args.gradient_checkpointing) == ("adamw", "fp16", True)
        assert (args.max_grad_norm, args.adam_epsilon, args.proportion_empty_prompts) == (row.clip, 1e-8, 0.1)
        assert args.center_crop and args.crop is None and args.resolution == 512 and args.caption_column == "text"
    else:
        assert (args.optimizer, args.mixed_precision, args.gradient_checkpointing) == ("adam", "no", False)
        assert args.max_grad_norm == pytest.approx(row.clip / row.elements, rel=2e-3)
        assert args.adam_epsilon == pytest.approx(1e-8 / row.elements, rel=2e-3)
        assert args.antithetic_timesteps and args.student_init == "taylor" and args.taylor_timesteps == 1000
        assert args.crop == ([57, 25, 128, 128] if "celeba" in name else None)
        assert args.center_crop == ("bedroom" in name)
    assert args.random_flip
    others = [each.output_dir for each in recipes.values()]
    assert others.count(args.output_dir) == 1


def test_all_pixel_recipes_have_a_pixel_feature_weight(recipes):
    """The recipes of the paper and all others; 1 would be thousands of times too much."""
    for path in (ROOT / "recipes").glob("*.args"):
        script = "train_lift.py" if "train_lift.py" in path.read_text() else "train_place.py"
        args = recipes.get(path.stem) or parse([f"@{path}"], script)
        parse([f"@{path}"], "train_lift.py")  # the other columns of a table
        own = args.student_preset or args.kept_layers or args.student_depth
        assert own or args.lambda_kd_feat < 1e-4, path.name
    assert {path.stem for path in (ROOT / "recipes").glob("ddpm_*place*.args")} == {x for x in PAPER if "ddpm" in x}


@pytest.mark.parametrize("name", PAPER)
def test_a_recipes_head_tells_what_it_is(recipes, name):
    """Sizes on the meta device; what it matches, what it cannot, where the data come from, what it costs."""
    _, student, model_class = configs_of(recipes[name])
    with torch.device("meta"):
        model = model_class(**full_config(student, model_class))
    row, said = PAPER[name], heads(name)[0]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    if model_class is DiTTransformer2DModel:
        assert f"({parameters:.1f}M of 749.8M in diffusers" in said.replace("  ", " ")
        parameters = paper_parameters(model) / 1e6
    assert round(parameters, 1) == row.ours and f"{row.ours}M" in said
    assert abs(row.ours - row.paper) < 0.11 or f"{row.paper}M there" in said
    assert "ot run by us" in said and "A100-hours (estimate: docs/paper.md" in said
    assert row.fid is None or f"FID {row.fid:.2f}" in said
    included = " ".join(heads(name))
    assert all(
        word in included for word in ("Matches", "Cannot", "Data:" if "celeba" not in name else "CelebA as DDIM")
    )
    table = next((line for line in DOCUMENTS["paper.md"].split("\n") if f"| `{name}` |" in line), None)
    if row.fid is not None:
        cells = [cell.strip() for cell in table.split("|")[3:-1]]
        numbers = [f"{row.steps:,}", f"{row.rate:.0e}".replace("e-0", "e-"), str(row.images)]
        assert cells[:3] == numbers and float(cells[3]) == row.feature and float(cells[4]) == row.ema
        assert cells[5:7] == [f"{row.ours}M ({row.paper}M)", f"{row.fid:.2f}"]
        assert f" {cells[7]} A100-hours" in f" {said}"


def test_the_recipe_of_sd3_says_what_it_is():
    args, said = parse(["@recipes/sd3_medium_d12.args"]), heads("sd3_medium_d12")[0]
    kept = even_layers(SD3_MEDIUM["num_layers"], args.student_depth)
    sizes = [
        model_size(config, SD3Transformer2DModel)
        for config in (SD3_MEDIUM, depth_config(SD3_MEDIUM, kept, SD3Transformer2DModel))
    ]
    assert " of ".join(f"{size.parameters / 1e6:,.1f}M" for size in reversed(sizes)) in said
    images = args.train_batch_size * args.gradient_accumulation_steps * args.max_train_steps
    assert args.gradient_checkpointing
    hours = 2 * (sizes[0].macs + 4 * sizes[1].macs) * images / SPEED / 3600
    assert int(re.search(r"(\d+) A100-hours", said)[1]) == round(hours)
    assert "not the authors'" in said and "Not run by us" in said and "gated" in said and "Community License" in said
    assert args.lambda_kd_feat == pytest.approx(0.01 / args.student_depth, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_gpu_hours_follow_the_rule(recipes, name):
    teacher, student, model_class = configs_of(recipes[name])
    forwards = 4 if recipes[name].gradient_checkpointing else 3
    macs = model_size(teacher, model_class).macs + forwards * model_size(student, model_class).macs
    hours = 2 * macs * PAPER[name].steps * PAPER[name].images / SPEED / 3600
    assert int(re.search(r"(\d+) A100-hours", heads(name)[0])[1]) == round(hours)


@pytest.mark.slow
def test_the_teachers_gpu_hours_follow_the_rule():
    args = parse(["@recipes/ddpm_celeba64_teacher.args"], "train_lift.py")
    config = read_json_config(args.student_config, "--student_config")
    hours = 2 * 3 * model_size(config).macs * args.max_train_steps * args.train_batch_size / SPEED / 3600
    assert int(re.search(r"(\d+) A100-hours", heads("ddpm_celeba64_teacher")[0])[1]) == round(hours)


COLUMNS = re.findall(r"^\| ([\w/+ ]+) \| `(--[^`]*)`", DOCUMENTS["paper.md"], flags=re.MULTILINE)[:5]


@pytest.mark.parametrize("column, flags", COLUMNS, ids=[column for column, _ in COLUMNS])
@pytest.mark.parametrize("name", ["ddpm_celeba64_place_90", "sd21_bk_small", "dit_xl2_d7"])
def test_the_other_columns_are_recipes_too(column, flags, name):
    # of a DiT recipe what belongs to lines and features is idle then, and warned of
    args = parse([f"@recipes/{name}.args", *flags.split()], "train_lift.py", idle="dit" in name)
    wanted = {"w/o KD": (0, 0), "OutKD": ("mse", 0), "FeatKD": (0, 1), "Out + Feat": ("mse", 1), "LIFT": ("lift", 1)}
    assert len(COLUMNS) == len(wanted)
    output, feature = wanted[column]
    assert (args.output_loss if args.lambda_kd_output else 0, int(args.lambda_kd_feat > 0)) == (output, feature)
    assert args.lambda_task == (0.1 if "dit" in name else 1) and args.max_train_steps == PAPER[name].steps


def test_the_celeba_teacher_is_the_papers():
    """DDIM's configs/celeba.yml: 78.7M parameters."""
    args = parse(["@recipes/ddpm_celeba64_teacher.args"], "train_lift.py")
    config = read_json_config(args.student_config, "--student_config")
    with torch.device("meta"):
        model = UNet2DModel(**full_config(config))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 78.7
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} >= {0.1}
    assert (args.crop, args.resolution) == ([57, 25, 128, 128], 64)
    assert args.max_grad_norm * CELEBA == pytest.approx(1, rel=2e-3)


# The documents


VARIABLES, HUB = r"(?:[A-Z_]+=\S+ +)*", "utils.publishing.hub"  # before a command; and one that is a module


def commands(text: str) -> list[str]:
    """The commands of the code blocks, without their comments in backticks, each as one line."""
    parts = re.split(r"^```(\w*)\n", text, flags=re.MULTILINE)  # prose, kind, block, "", prose ...
    lines = "".join(block for kind, block in zip(parts[1::4], parts[2::4], strict=True) if not kind)
    lines = lines.replace("\\\n", " ").split("\n")
    for prose in parts[::4]:
        lines += re.findall(f"`({VARIABLES}(?:accelerate launch|torchrun|python) [^`]*)`", prose.replace("\n", " "))
    whole = rf"{VARIABLES}(pip|accelerate|torchrun|python)\b.*(\.py|{re.escape(HUB)}) +\S"
    return [re.sub(r"`#[^`]*`", "", line) for line in lines if re.match(whole, line)]


COMMANDS = [(name, line) for name, text in DOCUMENTS.items() for line in commands(text)]


@pytest.mark.parametrize("name, line", COMMANDS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(COMMANDS)])
@pytest.mark.filterwarnings("ignore:.*no effect here")
def test_every_command_of_the_documents_parses(tmp_path, monkeypatch, name, line):
    monkeypatch.chdir(tmp_path)  # recipes and assets are found from anywhere
    (tmp_path / "coco_val_30k.txt").write_text("a dog\n")
    (tmp_path / "my.args").write_text("@assets/default.args\n")
    words = [word for word in shlex.split(line.partition(" && ")[2] or line, comments=True) if word != "--help"]
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word == HUB)
    name, given = words[script], words[script + 1 :]
    if name in TRAIN:
        args = parse_args(TRAIN[name].__doc__, TRAIN[name].add_method_arguments, given)
        assert args.pruning_ratio is None or args.lambda_kd_feat < 1e-4
    elif name == "evaluate_fid.py":
        args = utils.evaluation.arguments.parse_args(evaluate_fid.__doc__, given)
        assert args.num_samples
    elif name == HUB:
        shutil.copytree(ROOT / "assets" / "student", tmp_path / "student")
        assert utils.publishing.hub.parse_args(given).hub_model_id
    elif name == "analyze_error.py":
        utils.analysis.arguments.parse_args(analyze_error.__doc__, given)
    else:
        assert (ROOT / name).is_file()
        flags = [word for word in given if word.startswith("--")]
        assert all(flag.removeprefix("--") in (ROOT / name).read_text() for flag in flags), flags


def code(name: str) -> list[str]:
    """Python of a document."""
    return re.findall(r"^```python\n(.*?)^```", DOCUMENTS[name], re.MULTILINE | re.DOTALL)


def test_the_code_of_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "assets" / "student", "student")
    (drawing,) = code("README.md")
    names: dict = {}
    exec(drawing, names)
    assert names["image"].size == (16, 16)
    (loss,) = code("change.md")
    names = {"F": torch.nn.functional, "output_loss": output_loss}
    exec(loss, names)
    student = torch.randn(2, 1, 4, 4, requires_grad=True)
    names["cosine_loss"](student, torch.randn(2, 1, 4, 4)).loss.backward()
    assert student.grad.abs().sum() > 0
    assert sum(len(code(name)) for name in DOCUMENTS) == 2  # and there is no other


def test_every_page_is_one_click_from_the_first():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)\)", DOCUMENTS["README.md"]))
    assert linked == {*DOCUMENTS} - {"README.md"}


def test_the_map_of_the_code_names_every_file():
    """That is met when one looks for a place; `arguments` are in several folders."""
    words = {*re.findall(r"\w+", DOCUMENTS["change.md"])}
    files = {path.stem for path in (ROOT / "utils").rglob("*.py")} - {"__init__"}
    assert len(files) > 60 and files <= words


def test_every_row_of_the_paper_has_its_measurement(recipes):
    """The folder that a recipe writes is one that a command measures, with the protocol of its table."""
    measured = {}
    for line in commands(DOCUMENTS["paper.md"]):
        if "evaluate_fid.py" in line:
            recipe = re.search(r"@recipes/evaluate/(\w+)\.args", line)[1]
            measured[re.search(r"--pretrained_model_name_or_path (\S+)", line)[1]] = recipe
    kinds = {"celeba": "celeba64", "bedroom": "bedroom256", "sd21": "coco30k", "dit": "imagenet256"}
    for name, args in recipes.items():
        if PAPER[name].fid is not None:
            assert measured[args.output_dir] == next(kind for start, kind in kinds.items() if start in name)
            teacher = args.pretrained_model_name_or_path
            assert measured[teacher] == measured[args.output_dir]


def test_the_paper_is_named_only_where_it_is_true(capsys):
    """No document, help text or card calls something the paper's setting: settings are matched in part."""
    sources = [
        path for path in ROOT.rglob("*") if path.suffix in (".py", ".md", ".args") and "tests" not in path.parts
    ]
    assert len(sources) > 60
    for path in sources:
        assert not re.search(r"paper's (\w+ ){0,3}settings?\b", path.read_text()), path
    helps = {script: (ROOT / script).read_text() for script in TRAIN}
    assert all("--lambda_kd_feat 1" not in text for text in helps.values())


def test_the_student_that_ships_is_that_of_the_default():
    """Its arguments are the default's, its size is that of the documents, and stock diffusers draws with it."""
    folder = ROOT / "assets" / "student"
    default = parse_args("", train_place.add_method_arguments, [f"@{ROOT / 'assets' / 'default.args'}"])
    kept = json.loads((folder / "args.json").read_text())["arguments"]
    assert kept == {name: getattr(default, name) for name in kept}
    pipeline = DDIMPipeline.from_pretrained(folder)
    assert f"{sum(p.numel() for p in pipeline.unet.parameters()):,}" in (ROOT / "assets" / "README.md").read_text()
    image = pipeline(num_inference_steps=25, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    edge, middle = image[:, [0, -1]].mean(), image[4:12, 4:12].mean()
    assert edge < 0.1 < 0.3 < middle  # clothes on black
