# SPDX-License-Identifier: Apache-2.0
"""Pushes to a Hub on this machine, by the scripts as users run them, and what comes back from it."""

import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import latent_pipelines
import pytest
from conftest import build_unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from forks import ForkServer, Process
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_place
from utils.training.arguments import parse_args

ROOT = Path(__file__).resolve().parent.parent
TEACHER_CARD = "---\nlicense: other\nlicense_name: teacher-licence\nlicense_link: LICENSE.md\n---\n# Teacher\n"
PUBLISHED = {
    *("README.md", "args.json", "log.jsonl", "losses.png", "samples.png", "model_index.json", "report.html"),
    *("scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a teacher on it."""
    folder = tmp_path_factory.mktemp("hub_teacher")
    DDIMPipeline(build_unet(), DDIMScheduler()).save_pretrained(folder)  # samples in 50 steps
    (folder / "README.md").write_text(TEACHER_CARD)
    with HubServer() as server:
        server.publish("teacher", folder)
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The caches of the children, shared: the teacher is downloaded once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def child(hub, home):
    """`child(*words)`: Python with these arguments, for which `hub`, or another `server`, is the Hub."""
    with ForkServer(**hub.environment(home)) as forks:

        def run(*words, token: str | None = TOKEN, cwd: Path = ROOT, server: ForkServer = forks) -> Process:
            return server.run(*words, cwd=cwd, HF_TOKEN=token or "")

        yield run


@pytest.fixture(scope="module")
def train(child, data_dir):
    """`train(output, *flags)` runs train_place.py for two steps."""

    def run(output: Path, *flags, **options) -> Process:
        tiny = "--max_train_steps 2 --train_batch_size 4 --logging_steps 1 --validation_shown_samples 2 "
        tiny += "--pruning_ratio 0.5 --validation_num_inference_steps 2 --student_init magnitude --num_cpu_threads 1"
        data = ["--dataset_name", data_dir, "--output_dir", output]
        return child("train_place.py", *tiny.split(), *data, *flags, **options)

    return run


@pytest.fixture(scope="module")
def pushed(hub, train, tmp_path_factory):
    """A private student of the Hub's teacher, pushed at the end of its training; `.folder` is where it was made."""
    folder = tmp_path_factory.mktemp("pushed") / "student"
    flags = ["--pretrained_model_name_or_path", f"{USER}/teacher", "--push_to_hub", "--hub_model_id", "tiny"]
    done = train(folder, *flags, "--hub_private_repo", "--hub_token", TOKEN, token=None)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, done=done, repository=hub.repositories[f"{USER}/tiny"])


BACK = """
import sys, torch
ours, count = type(pipeline).from_pretrained(sys.argv[1]), 0
for name, part in ours.components.items():
    if isinstance(part, torch.nn.Module):
        theirs = getattr(pipeline, name).state_dict()
        assert theirs.keys() == part.state_dict().keys()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in part.state_dict().items())
        count += len(theirs)
assert not any(name.split(".")[0] in ("utils", "train_place") for name in sys.modules)
print(type(pipeline).__name__, count, image.size)
"""


def comes_back(child, hub: HubServer, home: Path, name: str, folder: Path) -> list[str]:
    """Runs the lines that the published card prints, in a process without this repository, and compares every tensor
    with the pipeline in `folder`: its class, how many tensors, and the size of the image that the card draws."""
    card = hub.repositories[f"{USER}/{name}"].files["README.md"][0].decode()
    loading = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert f'from_pretrained("{USER}/{name}")' in loading
    done = child("-c", loading + BACK, folder, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split(maxsplit=2)


def test_push_and_from_pretrained(child, hub, home, pushed):
    assert f"Pushed to {hub.url}/{USER}/tiny" in pushed.done.stdout
    assert pushed.repository.private
    assert len(pushed.repository.commits) == 2  # the repository's own, and one with everything
    assert set(pushed.repository.files) == {".gitattributes", *PUBLISHED}
    tensors = load_file(pushed.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert comes_back(child, hub, home, "tiny", pushed.folder) == ["DDIMPipeline", str(len(tensors)), "(8, 8)\n"]


@pytest.mark.slow
def test_push_of_a_latent_student(child, hub, home, tmp_path):
    """All the pipeline's parts go, the teacher's as they are, and come back."""
    teacher = latent_pipelines.save_pipeline(tmp_path / "sd1")
    data = latent_pipelines.save_captioned(tmp_path / "captioned", count=4)
    flags = "--student_preset bk_small --max_train_steps 1 --train_batch_size 2 --validation_shown_samples 2"
    flags += (
        " --report_to none --validation_num_inference_steps 2 --num_cpu_threads 1 --push_to_hub --hub_model_id latent"
    )
    folder = tmp_path / "student"
    paths = ["--pretrained_model_name_or_path", teacher, "--train_data_dir", data, "--output_dir", folder]
    done = child("train_place.py", *flags.split(), *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    repository = hub.repositories[f"{USER}/latent"]
    for part in ("vae", "text_encoder", "unet"):
        (name,) = [name for name in repository.files if name.startswith(f"{part}/") and name.endswith(".safetensors")]
        local = (folder if part == "unet" else teacher) / name
        assert repository.files[name] == (local.read_bytes(), True)
    assert all(name in repository.files for name in ("tokenizer/tokenizer_config.json", "samples.png", "README.md"))
    tensors = [load_file(path) for path in folder.glob("*/*.safetensors")]
    kind, count, size = comes_back(child, hub, home, "latent", folder)
    assert (kind, size) == ("StableDiffusionPipeline", "(32, 32)\n")
    assert int(count) == sum(map(len, tensors))


@pytest.mark.slow
def test_a_latent_teacher_is_fetched_and_judged_before_training(child, hub, home, tmp_path):
    """Its parts are here after a dry run, without which they would be missed after the last step."""
    whole = latent_pipelines.save_pipeline(tmp_path / "whole")
    (whole / "README.md").write_text(TEACHER_CARD)
    encoder = whole / "text_encoder" / "model.safetensors"
    hub.publish("whole", whole)
    index = json.loads((whole / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (whole / "model_index.json").write_text(json.dumps(index))
    hub.publish("lacking", whole)
    data = latent_pipelines.save_captioned(tmp_path / "captioned", count=4)
    flags = (
        f"--student_preset bk_small --train_batch_size 2 --report_to none --num_cpu_threads 1 --train_data_dir {data} "
        "--dry_run"
    )
    for name, refusal in (("whole", None), ("lacking", "lists a safety_checker, a StableDiffusionSafetyChecker")):
        teacher = ["--pretrained_model_name_or_path", f"{USER}/{name}", "--output_dir", tmp_path / name / "student"]
        done = child("train_place.py", *flags.split(), *teacher)
        assert done.returncode == (2 if refusal else 0), done.stderr[-3000:]
        assert refusal is None or refusal in done.stderr
    fetched = [path for path in home.rglob("text_encoder/model.safetensors") if "models--somebody--whole" in str(path)]
    assert [path.read_bytes() for path in fetched] == [encoder.read_bytes()]


def test_the_published_card(pushed):
    card = ModelCard(pushed.repository.files["README.md"][0].decode())
    assert card.data.base_model == f"{USER}/teacher" and card.data.base_model_relation == "finetune"
    assert card.data.license == "other" and card.data.license_name == "teacher-licence"
    assert card.data.license_link == f"https://huggingface.co/{USER}/teacher/blob/main/LICENSE.md"
    assert card.data.datasets is None  # a folder, no dataset of the Hub
    for name, (content, lfs) in pushed.repository.files.items():
        assert lfs == name.endswith(".safetensors")
        assert str(pushed.folder.parent).encode() not in content, name
    arguments = json.loads(pushed.repository.files["args.json"][0])["arguments"]
    assert arguments["output_dir"] == "student" and arguments["pretrained_model_name_or_path"] == f"{USER}/teacher"
    # the folder's own copies are as they were: its card loads from the folder
    assert json.loads((pushed.folder / "args.json").read_text())["arguments"]["output_dir"] == str(pushed.folder)
    assert f'from_pretrained("{pushed.folder}")' in (pushed.folder / "README.md").read_text()


def test_the_token_is_written_nowhere(pushed, home):
    written = [path for place in (pushed.folder, home) for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"state.json", "args.json", "card.json", "README.md", "log.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)  # a tracker
    holding = [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert holding == []
    assert TOKEN not in pushed.done.stdout + pushed.done.stderr
    assert not any(TOKEN.encode() in content for content, _ in pushed.repository.files.values())
    assert "hub_token" not in (pushed.folder / "args.json").read_text()


def test_a_refused_token_stops_before_training(hub, train, tmp_path, teacher_dir):
    flags = ["--pretrained_model_name_or_path", teacher_dir, "--push_to_hub", "--hub_model_id", "never"]
    done = train(tmp_path / "student", *flags, token="hf_wrong")
    assert done.returncode != 0
    assert re.search(r"^train_place.py: error: --push_to_hub: .*--hub_token", done.stderr, re.MULTILINE)
    assert "hf_wrong" not in done.stdout + done.stderr
    assert not (tmp_path / "student").exists() and f"{USER}/never" not in hub.repositories
    assert "parameters" not in done.stdout  # not even the plan


def test_refusals_before_training(child, hub):
    """Each by name, before hours are spent; asked of the function, in one process."""
    hub.publish("public", ROOT / "tests" / "nothing")
    hub.publish("frozen", ROOT / "tests" / "nothing")
    hub.repositories[f"{USER}/frozen"].read_only = True
    script = (
        "from utils.publishing.hub import check_repository, create_repository\n"
        "for refuse in (check_repository, create_repository):\n"
        "    for name, private in (('public', True), ('frozen', False), ('other/theirs', False), ('a b', False)):\n"
        "        try: print('let through', refuse(name, private))\n"
        "        except ValueError as error: print(*str(error).split())\n"
        "print('made', create_repository('public', False))\n"
        "print('checked', check_repository('imagined', False))\n"
    )
    done = child("-c", script)
    lines = done.stdout.splitlines()
    assert not any(line.startswith("let through") for line in lines)
    refusals = [line for line in lines if line.startswith("--")]
    for public, frozen, theirs, impossible in (refusals[:4], refusals[4:]):  # before the dry run ends, and after it
        assert public.startswith(f"--hub_private_repo: {USER}/public exists and is public.")
        assert re.match(r"--push_to_hub: the Hub refused frozen, .*You may not write here", frozen)
        assert re.match(r"--push_to_hub: the Hub refused other/theirs", theirs)
        assert re.match(r"--push_to_hub: the Hub refused a b, .*HFValidationError", impossible)
    assert [line for line in lines if not line.startswith("-")][-2:] == [f"made {USER}/public", "checked None"]
    assert f"{USER}/imagined" not in hub.repositories


def test_offline_is_refused_in_the_process(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="--push_to_hub: .*OfflineModeIsEnabled") as caught:
        run("train_lift", "--push_to_hub", "--dry_run")
    assert TOKEN not in str(caught.value) and not (tmp_path / "student").exists()


def test_why_a_teacher_cannot_be_had(child, hub, home):
    """Another sentence for each reason, of a name that may well be right."""
    hub.publish("terms", ROOT / "tests" / "nothing")
    hub.repositories[f"{USER}/terms"].gated = True

    def refusal(name: str, revision: str | None = None, before: str = "") -> str:
        script = f"{before}\nfrom utils.backbones.loading import pipeline_index\n"
        script += f"try: pipeline_index({name!r}, {revision!r}, '--x')\nexcept ValueError as error: print(error)"
        (line,) = child("-c", script).stdout.splitlines()[-1:]
        assert line.startswith(f"--x {name}: no such folder here, and ")
        return line

    assert "has terms to accept" in refusal(f"{USER}/terms")
    assert "the Hub has none of that name" in refusal(f"{USER}/typo")
    assert "not of this revision" in refusal(f"{USER}/teacher", "v7")
    change = "import huggingface_hub.constants as c, huggingface_hub.utils._http as h\n"
    assert "HF_HUB_OFFLINE is set" in refusal(f"{USER}/typo", before=f"{change}c.HF_HUB_OFFLINE = True")
    nowhere = "c.ENDPOINT, c.HUGGINGFACE_CO_URL_TEMPLATE = ('http://127.0.0.1:9' + x for x in ('', "
    nowhere += "'/{repo_id}/resolve/{revision}/{filename}'))"
    assert "the Hub cannot be reached" in refusal(f"{USER}/typo", before=f"{change}{nowhere}")


@pytest.mark.slow
def test_a_server_that_dies_in_the_upload(hub, home, child, train, tmp_path, teacher_dir):
    folder = tmp_path / "student"
    with HubServer() as dying:
        dying.dies_in_upload = True
        flags = ["--pretrained_model_name_or_path", teacher_dir, "--push_to_hub", "--hub_model_id", "survivor"]
        with ForkServer(**dying.environment(home)) as forks:
            done = train(folder, *flags, "--report_to", "none", server=forks)
            code, printed, errors = done.returncode, done.stdout, done.stderr  # they go with the server
        assert any(request.startswith("PUT") for request in dying.requests)
    assert code != 0
    lines = errors.splitlines()
    (last,) = [i for i, line in enumerate(lines) if " -m utils.publishing.hub " in line]
    where, command = lines[last - 1 : last + 1]
    assert f"The push to {USER}/survivor failed" in where and str(folder) in where
    assert "Saved:" in printed and "Pushed" not in printed
    assert DDPMPipeline.from_pretrained(folder).unet.config.block_out_channels == [8, 16]

    _cd, root, _then, _python, *words = shlex.split(command)
    again = child(*words, cwd=tmp_path / root)
    assert again.returncode == 0, again.stderr[-3000:]
    assert set(hub.repositories[f"{USER}/survivor"].files) == {".gitattributes", *PUBLISHED}


def test_a_student_trained_without_the_flag(hub, child, train, tmp_path, teacher_dir):
    folder = tmp_path / "student"
    before = list(hub.requests)
    done = train(folder, "--pretrained_model_name_or_path", teacher_dir, "--report_to", "none")
    assert done.returncode == 0 and "Pushed" not in done.stdout
    assert hub.requests == before  # nobody asked the Hub anything

    # into a repository that exists and holds something else
    hub.publish("later", ROOT / "tests" / "nothing")
    repository = hub.repositories[f"{USER}/later"]
    repository.files["notes.txt"] = (b"mine", False)
    push = ["-m", "utils.publishing.hub", folder, "--hub_model_id", f"{USER}/later"]
    assert child(*push).returncode == 0
    assert set(repository.files) == {".gitattributes", "notes.txt", *PUBLISHED}
    assert len(repository.commits) == 2

    # the same again: no error, no commit
    again = child(*push)
    assert again.returncode == 0 and "Pushed" in again.stdout
    assert len(repository.commits) == 2

    # measured and described by hand since: both are published
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"fid": 9.5}, "protocol": {"images": str(folder)}}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    assert child(*push).returncode == 0
    assert repository.files["README.md"][0].endswith(b"# By hand\n")
    assert json.loads(repository.files["metrics.json"][0])["protocol"] == {"images": "student"}
    assert len(repository.commits) == 3


def test_only_a_pipeline_is_pushed(hub, child, tmp_path):
    done = child("-m", "utils.publishing.hub", tmp_path, "--hub_model_id", "empty")
    assert done.returncode != 0 and "no model_index.json" in done.stderr
    assert f"{USER}/empty" not in hub.repositories


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """`parse(*flags)` -> the parsed arguments; HF_TOKEN and sys.argv are put back."""
    monkeypatch.setenv("HF_TOKEN", "")

    def parse_flags(*flags):
        argv = ["--pretrained_model_name_or_path", "t", "--dataset_name", "d", "--pruning_ratio", "0.5"]
        argv += ["--output_dir", str(tmp_path / "out"), *flags]
        monkeypatch.setattr(sys, "argv", ["train_place.py", *argv])
        return parse_args("", train_place.add_method_arguments, argv)

    return parse_flags


@pytest.mark.parametrize("flags", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_token_leaves_the_arguments(parse, flags):
    args = parse("--push_to_hub", *flags)
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in str(vars(args)) and not hasattr(args, "hub_token")
    assert "hf_secret" not in " ".join(sys.argv) and "***" in sys.argv[-1]


def test_an_empty_token_is_none(parse):
    parse("--push_to_hub", "--hub_token", "")
    assert os.environ["HF_TOKEN"] == "" and "***" not in "".join(sys.argv)


def test_a_misspelt_flag_does_not_show_the_token(parse):
    with pytest.raises(ValueError, match="--hub_tokn hf_[*]{3} .did you mean --hub_token") as caught:
        parse("--hub_tokn", "hf_secret")
    assert "secret" not in str(caught.value)


def test_hub_flags_are_checked(parse):
    with pytest.raises(ValueError, match="--hub_model_id: .*a/b/c"):
        parse("--push_to_hub", "--hub_model_id", "a/b/c")
    with pytest.raises(ValueError, match="--hub_model_id: .*my student"):
        parse("--push_to_hub", "--output_dir", "my student")
    with pytest.warns(UserWarning, match="--hub_private_repo has no effect here: it goes with --push_to_hub"):
        parse("--hub_private_repo")
    with warnings.catch_warnings(action="error"):
        parse("--push_to_hub", "--hub_model_id", "somebody/x", "--hub_private_repo")
