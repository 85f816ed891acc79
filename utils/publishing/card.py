# SPDX-License-Identifier: Apache-2.0
"""The student's model card: one template, for its folder and for the Hub alike.

What the template needs of a run is kept in `card.json`, so that the card can be written again at any time: with the
repository's name when it is pushed, with metrics when `metrics.json` has come.
"""

import inspect
import json
import shlex
import warnings
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from utils.distillation.equations import equations
from utils.files import sha256, write_file, write_json
from utils.publishing.curves import plot_losses
from utils.publishing.model_index import card_evaluation, eval_results, without_paths

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(args, backbone, *, method: str, sizes: str, distances: dict[str, float]) -> None:
    """`card.json`, `losses.png` and the card, `README.md`, in `--output_dir` beside `args.json` and `log.jsonl`."""
    folder = Path(args.output_dir)
    teacher = args.pretrained_model_name_or_path
    takes = inspect.signature(backbone.pipeline_class.__call__).parameters
    # the Hub has no name for class-conditional images
    tag = "text-to-image" if "prompt" in takes else "unconditional-image-generation"
    facts = {
        "base_model": teacher if _on_hub(teacher) else None,
        "datasets": [args.dataset_name] if _on_hub(args.dataset_name) else None,
        "license": _licence(teacher, args.revision) if teacher else {},
        "pipeline_class": backbone.pipeline_class.__name__,
        "pipeline_tag": tag,
        "call": f"pipeline({backbone.conditions.call})",
        "absent": list(backbone.conditions.absent),
        "component": backbone.component,
        "sampler": backbone.process.name,
        "method": method,
        "sizes": sizes,
        "distances": distances,
    }
    plot_losses(folder / "log.jsonl", folder / "losses.png")
    _save(folder, facts)


def update_card(folder: Path) -> bool:
    """Write `README.md` again, as `metrics.json` may have come. False where there is no card of the training scripts,
    or one that was edited by hand, which stays as it is."""
    facts = _facts(folder)
    if not facts or _edited(folder, facts):
        return False
    _save(folder, facts)
    return True


def card_for_hub(folder: Path, repo_id: str) -> str | None:
    """The card as it is published: it loads from `repo_id`. One edited by hand is published as it is; None if `folder`
    has no card at all."""
    facts = _facts(folder)
    if facts and not _edited(folder, facts):
        return render(folder, facts, repo_id)
    return (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").exists() else None


def render(folder: Path, facts: dict, name: str) -> str:
    """The card of the student in `folder`, loading from `name`, a path or Hub id. Nothing in it but `name` is an
    absolute path: they are cut to their last part."""
    made_with = json.loads((folder / "args.json").read_text())
    args = without_paths(made_with["arguments"])
    teacher, data = args["pretrained_model_name_or_path"], args["dataset_name"] or args["train_data_dir"]
    title = Path(name).resolve().name
    measured = folder / "metrics.json"
    evaluation = card_evaluation(json.loads(measured.read_text()) if measured.exists() else {})
    results = eval_results(evaluation, facts["pipeline_tag"], data)
    link = f"[{teacher}](https://huggingface.co/{teacher})" if facts["base_model"] else f"`{teacher}`"
    if args["lambda_kd_output"] or args["lambda_kd_feat"]:
        made = f"Distilled from {link} with {facts['method']}"
    else:
        made = f"A smaller {link}, trained without distillation" if teacher else "Trained from scratch"
    card_data = ModelCardData(
        base_model=facts["base_model"],
        base_model_relation="finetune" if facts["base_model"] else None,  # the Hub has no word for distilled
        datasets=facts["datasets"],
        **facts["license"],
        library_name="diffusers",
        pipeline_tag=facts["pipeline_tag"],
        tags=["diffusers", "distillation", "lift-place"] if made.startswith("Distilled") else ["diffusers"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    lines, total = equations(args)
    config = json.loads((folder / facts["component"] / "config.json").read_text())
    return str(
        ModelCard.from_template(
            card_data,
            template_path=TEMPLATE,
            **{key: facts[key] for key in ("pipeline_class", "call", "sizes", "sampler", "distances")},
            title=title,
            load=", ".join([json.dumps(name), *(f"{part}=None" for part in facts.get("absent", ()))]),
            name=name,
            made=f"{made} on `{data}`",
            batch=f"{args['train_batch_size']} x {args['gradient_accumulation_steps']}",
            args=args,
            teacher=teacher,
            no_mid_block=config.get("mid_block_type", "") is None,
            metrics=evaluation["metrics"],
            protocol=yaml.safe_dump(evaluation["protocol"], sort_keys=False).strip(),
            equations=lines,
            total=total,
            script=made_with["script"],
            recipe=_recipe(args),
            licence=_licence_sentence(facts, teacher),
        )
    )


def _save(folder: Path, facts: dict) -> None:
    text = render(folder, facts, json.loads((folder / "args.json").read_text())["arguments"]["output_dir"])
    write_file(folder / "README.md", text)
    write_json(folder / "card.json", {**facts, "readme_sha256": sha256(folder / "README.md")})


def _facts(folder: Path) -> dict | None:
    return json.loads((folder / "card.json").read_text()) if (folder / "card.json").exists() else None


def _edited(folder: Path, facts: dict) -> bool:
    readme = folder / "README.md"
    return readme.exists() and sha256(readme) != facts["readme_sha256"]


def _on_hub(name: str | None) -> bool:
    """Whether `name` can only be a Hub id: `assets/teacher` looks like one, but is a folder here."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _licence(teacher: str, revision: str | None) -> dict[str, str]:
    """The licence in the front matter of the teacher's card, as that of the student; empty where there is none."""
    try:
        readme = Path(teacher) / "README.md"
        if _on_hub(teacher):
            readme = hf_hub_download(teacher, "README.md", revision=revision)
        elif not readme.exists():
            return {}
        data = ModelCard.load(readme).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        warnings.warn(f"The licence of {teacher} could not be read, so the card names none: {error}", stacklevel=2)
        return {}
    licence = {key: data.get(key) for key in ("license", "license_name", "license_link") if data.get(key)}
    link = licence.get("license_link", "https://")
    if "://" not in link:  # a file beside the teacher's card
        if _on_hub(teacher):
            licence["license_link"] = f"https://huggingface.co/{teacher}/blob/{revision or 'main'}/{link}"
        else:
            del licence["license_link"]
    return licence


def _licence_sentence(facts: dict, teacher: str | None) -> str:
    licence = facts["license"].get("license_name", facts["license"].get("license"))
    if licence:
        return f"Its licence is the teacher's, {licence}."
    if teacher:
        return "The teacher's card names no licence: find it before you use or publish the student."
    return "No licence has been chosen yet."


def _recipe(args: dict) -> str:
    """Every flag as a line of a recipe file; those that are off, or have no value, as comments."""
    lines = []
    for name, value in args.items():
        if value is None or value is False:
            lines.append(f"# --{name}")
        else:
            words = [] if value is True else value if isinstance(value, list) else [value]
            lines.append(" ".join([f"--{name}", *(_quoted(str(word)) for word in words)]))
    return "\n".join(lines)


def _quoted(word: str) -> str:
    """As a recipe reads it: a value that begins with @ has two."""
    return shlex.quote(f"@{word}" if word.startswith("@") and shlex.quote(word) == word else word)
