# SPDX-License-Identifier: Apache-2.0
"""The files beside the code: what git leaves alone, how to cite, how to contribute, what a workflow runs."""

import os
import re
import subprocess

import pytest
import yaml
from forks import ROOT

DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.args"), *ROOT.glob("assets/*.args")]
WRITTEN = re.compile(r"--(?:output_dir|latent_cache_dir|train_data_dir) ([a-z][\w.-]*[\w/])(?=[\s`]|$)", re.MULTILINE)


def git(*words) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: `check-ignore` has found none
    return done.stdout.splitlines()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_git_leaves_alone_what_documented_commands_write():
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    commands = [line for line in text.splitlines() if line.lstrip().startswith("--") or ".py" in line]
    folders = {name.rstrip("/") for line in commands for name in WRITTEN.findall(line)}
    folders |= {"student", "evaluation", "analysis", "teacher", "study", "sample.png"}  # defaults, and what is printed
    assert {"faces-50", "sd21-bk-tiny", "ddpm-celeba64"} <= folders
    paths = [name if "." in name else f"{name}/any" for name in sorted(folders)]
    assert set(git("check-ignore", "--no-index", *paths)) == set(paths)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_git_overlooks_nothing_of_ours():
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []
    ours = ["utils/evaluation/new.py", "utils/analysis/new.py", "benchmarks/study/new.json", "assets/teacher/new.json"]
    assert git("check-ignore", "--no-index", *ours) == []


def test_the_citation_names_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["license"] == "Apache-2.0"
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Han", "Yeo", "Yoo"]
    assert paper["year"] == 2026 and paper["url"].removeprefix("https://") in (ROOT / "README.md").read_text()


def test_the_workflow_runs_what_we_run():
    (workflow,) = (ROOT / ".github" / "workflows").iterdir()
    content = yaml.safe_load(workflow.read_text())
    assert {step.get("run") for step in content["jobs"]["tests"]["steps"]} == {None, ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    least = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert least in content["jobs"]["tests"]["strategy"]["matrix"]["python"]


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = [name for name in re.findall(r"`([\w./]+\.(?:py|md))`", text) if "NAME" not in name]
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "utils" / "backbones" / name).exists(), name
    code = "".join((ROOT / name).read_text() for name in named if (ROOT / name).exists())
    for word in ("KDLoss", "BASELINES", "VARIANTS", "KINDS", "method_name"):  # what is in them
        assert word in text and word in code, word
