# SPDX-License-Identifier: Apache-2.0
"""What the content of a cache of latents depends on, so that none is used for what it was not made of."""

import hashlib
from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from torch.utils.data import Dataset

from utils.data.images import file_content
from utils.devices import DTYPES
from utils.files import loaded_files, read_json, sha256
from utils.hub_folders import teacher_folder, vae_folder

FORMAT = 3  # of cache.json and the files beside it: counted up when one of them means something else
HASHED_BYTES = 2**30  # of pictures: a data set up to this size is hashed whole, of a larger one every so manieth row


def cache_settings(args, accelerator: Accelerator, dataset: Dataset | None, backbone) -> dict:
    """Everything that the content of a cache depends on, by name, from the objects that make it: the pictures and
    captions, the fields of the transform, the files of the encoders. Without the dataset, what is not the dataset's.

    Left out is what decides no more than the last bits of a latent: batch size, device, versions of libraries."""
    transform = backbone.transform(args)
    read, data = {**transform.settings(), **backbone.conditions.settings()}, {}
    if dataset is None:  # then the names of its columns decide nothing
        read = {name: value for name, value in read.items() if not name.endswith(("_column", "columns"))}
    else:
        columns = (transform.image_column, *transform.columns)
        data = {"data": dataset.fingerprint(), "rows": len(dataset), "content": content_hash(dataset.rows, columns)}
    dtype = DTYPES[args.teacher_dtype or accelerator.mixed_precision]
    return {
        **data,
        "format": FORMAT,
        **encoder_hashes(args, ["vae", *backbone.conditions.components]),
        "dtype": str(dtype),
        "vae_dtype": str(backbone.vae.dtype or dtype),
        **read,
        "seed": args.seed,
        "variants": args.cache_variants or 1,
    }


def content_hash(rows, columns: Sequence[str]) -> str:
    """Of what a `datasets.Dataset`, images undecoded, holds in `columns`: captions of every row, pictures of every row
    up to `HASHED_BYTES` of them, of more every second, third ... row. The same wherever the data lie."""
    columns = list(dict.fromkeys(columns))
    some = [len(file_content(rows[int(row)][columns[0]])) for row in np.linspace(0, len(rows) - 1, 32, dtype=int)]
    every = max(1, round(np.mean(some) * len(rows) / HASHED_BYTES))
    digest = hashlib.sha256()
    if columns[1:]:
        for batch in rows.select_columns(columns[1:]).iter(batch_size=1000):
            digest.update(repr(batch).encode())
    for row in rows.select(range(0, len(rows), every)).select_columns(columns[:1]):
        digest.update(hashlib.sha256(file_content(row[columns[0]])).digest())
    return digest.hexdigest()[:16]


def encoder_hashes(args, components: list[str]) -> dict[str, str]:
    """Of the files that VAE, text encoders and tokenizers are loaded from, wherever they lie, and of what the pipeline
    says of prompts, by name.

    Raises:
        UsageError: `--pretrained_vae_model_name_or_path` is not to be had.
    """
    other = args.pretrained_vae_model_name_or_path
    folder = teacher_folder(args.pretrained_model_name_or_path, args.revision, args.variant)
    parts = {part: (folder / part, args.variant) for part in components}
    parts |= {path.name: (path, None) for path in sorted(folder.glob("tokenizer*")) if path.is_dir()}
    if other:
        parts["vae"] = (vae_folder(other), None)
    said = {name: value for name, value in read_json(folder / "model_index.json").items() if isinstance(value, bool)}
    hashes = {}
    for part, (path, variant) in parts.items():
        digest = hashlib.sha256()
        for file in loaded_files(path.glob("*"), variant):
            if not file.name.endswith(".index.json"):  # says which shards there are
                digest.update(bytes.fromhex(sha256(file)))
        hashes[part] = digest.hexdigest()[:16]
    return {**hashes, "pipeline": said}
