# SPDX-License-Identifier: Apache-2.0
"""What samples are told: a prompt or a class label each, from the command line or from the reference's rows."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline

from utils.command_line import UsageError
from utils.data.labels import read_labels
from utils.data.transforms import check_captions, choose_caption
from utils.evaluation.pipelines import denoiser_of
from utils.flags import read_prompts_file
from utils.randomness import shuffled

LISTED = 100  # labels; a protocol has a longer list by its hash


def read_prompts(args, reference) -> list[str] | None:
    """The lines of `--prompts`, or the `--caption_column` of the reference's rows; None without either flag.

    Raises:
        UsageError: no such file or column, nothing in it, or something else than prompts.
    """
    if args.caption_column:
        if args.caption_column not in reference.rows.column_names:
            raise UsageError(
                f"--caption_column {args.caption_column}: the dataset has no such column, only "
                f"{', '.join(reference.rows.column_names)}."
            )
        check_captions(reference.rows.features[args.caption_column], args.caption_column)
        captions = reference.rows.select_columns(args.caption_column)
        prompts = [choose_caption(row[args.caption_column], 0) for row in captions]  # of several, the first
    elif args.prompts:
        return read_prompts_file(args.prompts)
    else:
        return None
    if not any(prompts):
        raise UsageError(f"--caption_column {args.caption_column}: there is no prompt in it.")
    return prompts


def read_class_labels(
    args, reference, pipeline: DiffusionPipeline, names: Mapping[int, str] | None = None
) -> list[int] | None:
    """`--class_labels`, or the `--label_column` of the reference's rows in the order of a shuffle by `--seed`, as data
    often lie class by class; None without either flag. `names`: what the pipeline calls its classes.

    Raises:
        UsageError: no such column, or labels that the pipeline does not know or does not take.
    """
    if not args.label_column:
        return args.class_labels
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        raise UsageError(f"--label_column has no effect: a {type(pipeline).__name__} takes no labels. Leave it out.")
    labels = read_labels(reference.rows, args.label_column, num_classes(pipeline) or 2**31, names)
    return [labels[row] for row in shuffled(args.seed, 0, len(labels))]


def num_classes(pipeline: DiffusionPipeline) -> int | None:
    """Those that its denoiser knows; None where it does not say."""
    config = denoiser_of(pipeline).config
    return config.get("num_embeds_ada_norm") or config.get("num_class_embeds")


def described(values: Sequence | None, listed: int = 0) -> Sequence | dict | None:
    """Prompts or labels as a protocol has them: a list of up to `listed` itself, a longer one's length and hash."""
    if isinstance(values, range):
        return f"0 to {values.stop - 1}"
    if not values or len(values) <= listed:
        return values
    return {"count": len(values), "sha256": hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()}
