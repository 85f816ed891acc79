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

from utils.counts import counted
from utils.distillation.equations import equations
from utils.files import sha256, write_file, write_json
from utils.publishing.curves import plot_losses
from utils.publishing.model_index import card_evaluation, eval_results, reference_name, without_paths
from utils.publishing.readable import (
    SIZES,
    cost_rows,
    cost_sentence,
    distance,
    metric_rows,
    protocol_sentence,
    size_rows,
    validation_sentence,
)
from utils.publishing.records import measured_by, read_log
from utils.publishing.repository import NAME, repository_url
from utils.students.sizes import model_size

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(args, backbone, validation, *, method: str, sizes: str) -> None:
    """`card.json`, `losses.png` and the card, `README.md`, in `--output_dir` beside `args.json` and `log.jsonl`.

    `validation` has the `distances` that were measured, and a `condition` of the data to call the student with.
    """
    folder = Path(args.output_dir)
    teacher = args.pretrained_model_name_or_path
    steps = args.validation_num_inference_steps
    generic = backbone.sampled_by == "DiffusionPipeline"
    takes = inspect.signature(backbone.pipeline_class.__call__).parameters
    # the Hub has no name for class-conditional images
    tag = "text-to-image" if "prompt" in takes else "unconditional-image-generation"
    facts = {
        "base_model": teacher if _on_hub(teacher) else None,
        "datasets": [args.dataset_name] if _on_hub(args.dataset_name) else None,
        "license": _licence(teacher, args.revision) if teacher else {},
        "repository": repository_url(),
        "pipeline_class": backbone.pipeline_class.__name__ if generic else backbone.sampled_by,
        "pipeline_tag": tag,
        "call": f"pipeline({backbone.sampling_arguments(steps, validation.condition)})",
        "absent": list(backbone.conditions.absent),
        "component": backbone.component,
        "sampler": backbone.process.name,
        "options": backbone.sampling_options,
        "method": method,
        "sizes": sizes,
        "size": _sizes(backbone.teacher, folder / backbone.component),
        "distances": validation.distances,
    }
    plot_losses(folder / "log.jsonl", folder / "losses.png", validation.distances.get("teacher"))
    _save(folder, facts)


def update_card(folder: Path) -> bool:
    """Write `README.md` again, as `metrics.json` may have come. False where there is no card of the training scripts,
    or one that was edited by hand, which stays as it is."""
    facts = card_facts(folder)
    if not facts or _edited(folder, facts):
        return False
    _save(folder, facts)
    return True


def card_for_hub(folder: Path, repo_id: str) -> str | None:
    """The card as it is published: it loads from `repo_id`. One edited by hand is published as it is; None if `folder`
    has no card at all."""
    facts = card_facts(folder)
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
    evaluation = card_evaluation(measured_by(folder / "metrics.json", folder))
    results = eval_results(evaluation, facts["pipeline_tag"], data)
    link = f"[{teacher}](https://huggingface.co/{teacher})" if facts["base_model"] else f"`{teacher}`"
    made = how_made(args, facts, link)
    card_data = ModelCardData(
        base_model=facts["base_model"],
        base_model_relation="finetune" if facts["base_model"] else None,  # the Hub has no word for distilled
        datasets=facts["datasets"],
        **facts["license"],
        library_name="diffusers",
        pipeline_tag=facts["pipeline_tag"],
        tags=["distillation", "lift-place"] if made.startswith("Distilled") else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    lines, total = equations(args, set().union(*read_log(folder)))
    config = json.loads((folder / facts["component"] / "config.json").read_text())
    return str(
        ModelCard.from_template(
            card_data,
            template_path=TEMPLATE,
            **{key: facts[key] for key in ("pipeline_class", "call", "sizes", "sampler")},
            title=title,
            load=", ".join([json.dumps(name), *(f"{part}=None" for part in facts.get("absent", ()))]),
            name=name,
            has_samples=(folder / "samples.png").is_file(),
            made=f"{made} on `{data}`",
            repository=f"[{NAME}]({facts['repository']})" if facts.get("repository") else f"`{NAME}`",
            batch=f"{args['train_batch_size']} x {args['gradient_accumulation_steps']}",
            options=facts.get("options", {}),
            size=size_rows(facts.get("size", {})),
            costs=cost_rows(evaluation["cost"] or {}, evaluation["compare_to"], SIZES if facts.get("size") else ()),
            cost_sentence=cost_sentence(evaluation["protocol"]),
            compared=evaluation["compared"],
            distances={
                who: distance(value, args["validation_num_samples"]) for who, value in facts["distances"].items()
            },
            validation_sentence=validation_sentence(args, facts["sampler"]),
            args=args,
            counted=counted,
            teacher=teacher,
            no_mid_block=config.get("mid_block_type", "") is None,
            metrics=metric_rows(evaluation),
            warnings=evaluation["warnings"],
            protocol_sentence=protocol_sentence(evaluation["protocol"], reference_name(evaluation["protocol"], data)),
            protocol=yaml.safe_dump(evaluation["protocol"], sort_keys=False).strip(),
            equations=lines,
            total=total,
            script=made_with["script"],
            recipe=recipe(args),
            licence=_licence_sentence(facts, teacher),
        )
    )


def how_made(args: dict, facts: dict, teacher: str) -> str:
    """The beginning of a sentence; `teacher` as it is to be written there."""
    if args["lambda_kd_output"] or args["lambda_kd_feat"]:
        return f"Distilled from {teacher} with {facts['method']}"
    named = args["pretrained_model_name_or_path"]
    return f"A smaller {teacher}, trained without distillation" if named else "Trained from scratch"


def _sizes(teacher, student: Path) -> dict[str, dict[str, int | None]]:
    """Of the teacher, where there is one, and of the student in its folder: see `readable.size_rows`."""
    found = {} if teacher is None else {"teacher": model_size(teacher.config, type(teacher))}
    found["student"] = model_size(json.loads((student / "config.json").read_text()))
    return {who: {"parameters": size.parameters, "macs": size.macs} for who, size in found.items()}


def _save(folder: Path, facts: dict) -> None:
    text = render(folder, facts, json.loads((folder / "args.json").read_text())["arguments"]["output_dir"])
    write_file(folder / "README.md", text)
    write_json(folder / "card.json", {**facts, "readme_sha256": sha256(folder / "README.md")})


def card_facts(folder: Path) -> dict | None:
    """What `write_card` has kept; None in a folder that a training script has not written."""
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


def recipe(args: dict) -> str:
    """Every flag as a line of a recipe file; those that are off, or have no value, as comments."""
    lines = []
    for name, value in args.items():
        if value is None or value is False:
            lines.append(f"# --{name}")
        else:
            words = [] if value is True else value if isinstance(value, list) else [value]
            if name == "kept_layers":  # one word
                words = [",".join(map(str, value))]
            lines.append(" ".join([f"--{name}", *(_quoted(str(word)) for word in words)]))
    return "\n".join(lines)


def _quoted(word: str) -> str:
    """As a recipe reads it: a value that begins with @ has two."""
    return shlex.quote(f"@{word}" if word.startswith("@") and shlex.quote(word) == word else word)
