# SPDX-License-Identifier: Apache-2.0
"""Whether a pipeline's folder is whole: judged before training of the teacher's, whose parts the export copies, and
after it of the export. Models are loaded as their library loads them, before training without their memory."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from utils.backbones.loading import OLD_NAMES, TEACHER
from utils.backbones.weights import Weights, find_weights
from utils.command_line import UsageError
from utils.files import read_json
from utils.hub_folders import VAE, teacher_folder, vae_folder

MODELS = (ModelMixin, PreTrainedModel)
TOKENIZERS = PreTrainedTokenizerBase
NO_PARTS = (None, [None, None])  # of model_index.json: a part that the pipeline goes without
RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # what transformers 5 no longer has under its old name
# what loading raises where files are damaged, absent or of another model
LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError, ImportError)


class Part(NamedTuple):
    """One part of a pipeline, as an export takes it over."""

    kind: type
    folder: Path
    weights: Weights | None  # of a model


def parts_to_copy(args, pipeline_class: type, component: str, needed: str) -> dict[str, Part]:
    """All that the student, `component`, takes over of its teacher, found whole. `needed`: the names of the parts that
    training loads too.

    Raises:
        UsageError: a part is absent, not whole, or of a class that the pipeline does not take.
    """
    source, other = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    folder, said = teacher_folder(source, args.revision, args.variant), f"{TEACHER} {source}"
    parts = {}
    for name, kind in parts_of(
        folder, pipeline_class, said, needed=needed, replaced=("vae",) if other else ()
    ).items():
        if name == component:
            continue
        read, variant, place = name in needed.split(), args.variant, folder / name
        if name == "vae" and other:
            kind, variant, place, said_of = AutoencoderKL, None, vae_folder(other), f"{VAE} {other}"
        else:
            said_of = said
            if folder != Path(source) and issubclass(kind, MODELS) and place.is_dir():
                _fetch_safetensors(kind, place, args, said, pickled=args.allow_pickle_weights or not read)
        weights = check_part(kind, place, said_of, variant=variant, pickled=args.allow_pickle_weights, read=read)
        parts[name] = Part(kind, place, weights)
    return parts


def _fetch_safetensors(kind: type, place: Path, args, said: str, *, pickled: bool) -> None:
    """Where another part has none, diffusers has downloaded pickled weights alone, of all parts. `pickled`: whether
    they would do."""
    try:
        find_weights(place, kind, args.variant, pickled=pickled)
    except ValueError:
        options = {"revision": args.revision, "variant": args.variant, "use_safetensors": True, "device_map": "meta"}
        _loaded(kind, args.pretrained_model_name_or_path, said, subfolder=place.name, **options)


def parts_of(
    folder: Path, pipeline_class: type, said: str, *, needed: str = "", replaced: Sequence[str] = ()
) -> dict[str, type]:
    """What model_index.json lists and the pipeline takes: name -> class. `needed`: the names that must be there;
    `replaced`: those that another source stands in for, whatever the index says.

    Raises:
        UsageError: a needed part is left out, or one is of a class that is unknown or not the pipeline's.
    """
    index = read_json(folder / "model_index.json") or {}
    if absent := [name for name in needed.split() if index.get(name) in NO_PARTS and name not in replaced]:
        raise UsageError(
            f"{said}: its model_index.json lists no {absent[0]}, which a {pipeline_class.__name__} needs to be "
            "trained."
        )
    parts = {}
    for name, kinds in pipeline_class._get_signature_types().items():
        entry = ["diffusers", kinds[0].__name__] if name in replaced else index.get(name)
        if entry in NO_PARTS or not isinstance(entry, list):
            continue
        library, class_name = entry
        try:
            kind = _class(library, class_name)
        except (ImportError, AttributeError, TypeError):
            raise UsageError(
                f"{said}: its {name} is a {class_name} of {library}, which neither diffusers nor transformers has "
                "here, so no student of it would load. Take a pipeline of stock classes."
            ) from None
        if class_name in (OLD_NAMES.get(each.__name__) for each in kinds if inspect.isclass(each)):
            kind = kinds[0]
        kinds = [each for each in kinds if inspect.isclass(each) and issubclass(each, (*MODELS, TOKENIZERS))]
        if kinds and not issubclass(kind, tuple(kinds)) and kind.__name__ != f"{kinds[0].__name__}Fast":
            raise UsageError(
                f"{said}: its {name} is a {class_name}; a {pipeline_class.__name__} takes a {kinds[0].__name__}."
            )
        parts[name] = kind
    return parts


def _class(library: str, name: str) -> type:
    stock = library in ("diffusers", "transformers")
    module = importlib.import_module(library) if stock else getattr(diffusers.pipelines, library)
    return getattr(module, RENAMED.get(name, name))


def index_of(index: dict[str, Any]) -> dict[str, Any]:
    """model_index.json in the words of today's libraries."""
    return {
        name: [entry[0], RENAMED.get(entry[1], entry[1])] if isinstance(entry, list) else entry
        for name, entry in index.items()
    }


def check_part(
    kind: type, folder: Path, said: str, *, variant: str | None = None, pickled: bool = False, read: bool = True
) -> Weights | None:
    """The weights that a part is copied with, None where it has none; with `read` every tensor of a model is looked
    for, and a tokenizer or the like loaded.

    Raises:
        UsageError: it is not there, not whole, or does not load.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{said} lists a {folder.name}, a {kind.__name__}, and has no such folder. Fetch it; a part that the "
            f'pipeline may go without can be left out: "{folder.name}": [null, null] in model_index.json.'
        )
    if not issubclass(kind, MODELS):
        if issubclass(kind, TOKENIZERS):
            _check_vocabulary(kind, folder, said)
        _loaded(kind, folder, said)
        return None
    try:
        weights = find_weights(folder, kind, variant, pickled=pickled or not read)
    except ValueError as error:
        raise UsageError(f"{said}: its {folder.name} is not whole: {error}") from error
    if read or not weights.pickled:
        stamps = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))
        _find_every_tensor(kind, folder, said, weights.variant, weights.pickled, stamps)
    return weights


def _check_vocabulary(kind: type, folder: Path, said: str) -> None:
    """Raises UsageError where transformers would make up a tokenizer to which all words are one."""
    names = dict(kind.vocab_files_names)
    whole = names.pop("tokenizer_file", "tokenizer.json")
    absent = [name for name in names.values() if not (folder / name).is_file()]
    if absent and not (folder / whole).is_file():
        raise UsageError(
            f"{said}: its {folder.name} is not whole: it holds neither {whole} nor {' and '.join(absent)}. Fetch them."
        )


@functools.cache  # an export that copies the part again, as the best student's, need not look again
def _find_every_tensor(
    kind: type, folder: Path, said: str, variant: str | None, pickled: bool, _stamps: tuple
) -> None:
    with quietly():
        load_whole(kind, folder, said, variant=variant, pickled=pickled, device_map="meta")


def load_whole(kind: type, folder: Path, said: str, *, pickled: bool | None = False, **options) -> torch.nn.Module:
    """A model of which no tensor is missing; libraries would go on with random ones. `pickled` None: as they choose.

    Raises:
        UsageError: it does not load.
    """
    options |= {"use_safetensors": None if pickled is None else not pickled, "output_loading_info": True}
    if issubclass(kind, PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # transformers' own error names none of them
    model, info = _loaded(kind, folder, said, **options)
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise UsageError(
            f"{said}: in the weights of its {folder.name} {name} is {tuple(found)}, by the config of this "
            f"{kind.__name__} {tuple(expected)}; they are of different models."
        )
    if info["missing_keys"]:
        raise UsageError(
            f"{said}: the weights in its {folder.name} lack {len(info['missing_keys'])} tensors of the "
            f"{kind.__name__} in its config, the first is {min(info['missing_keys'])}. Fetch them again."
        )
    return model


def _loaded(kind: type, folder: Path, said: str, **options):
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:
        if not isinstance(error, LOAD_ERRORS) and type(error).__name__ != "SafetensorError":
            raise
        raise UsageError(f"{said}: its {folder.name}, a {kind.__name__}, does not load: {error}") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars and reports, which speak of a load that is none."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
