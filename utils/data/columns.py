# SPDX-License-Identifier: Apache-2.0
"""Columns of a dataset that hold images, in whatever form: to files, {"bytes", "path"}, that are not decoded yet."""

import dataclasses
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from utils.command_line import UsageError
from utils.data.images import is_url

if TYPE_CHECKING:
    import datasets


def undecoded(rows: "datasets.Dataset", image_column: str, name: str) -> "datasets.Dataset":
    """`rows` with nothing that is decoded when it is read, and `image_column` as images: it may be declared as such,
    or hold the files' bytes, paths or both, or arrays (H, W) and (H, W, C). `name` is the dataset's, for errors.

    Raises:
        UsageError: the column holds no images, or none that can be read here.
    """
    import datasets

    for column, feature in rows.features.items():
        if _without_decoder(feature) != feature:
            rows = rows.cast_column(column, _without_decoder(feature))
    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        return _files(rows, image_column, name)
    what = f"--image_column {image_column}: {name} holds {feature} there"
    dimensions, values = 0, pa.chunked_array(rows.data.column(image_column))
    while is_list(values.type) or isinstance(values.type, pa.ExtensionType):
        is_extension = isinstance(values.type, pa.ExtensionType)
        parts = [chunk.storage if is_extension else chunk.flatten() for chunk in values.chunks]
        dimensions += not is_extension
        values = pa.chunked_array(parts, type=None if parts else pa.null())
    if dimensions:
        if dimensions == 1:
            raise UsageError(f"{what}, one row of values. Store images as files, or as arrays (H, W) or (H, W, C).")
        extremes = pc.min_max(values).as_py() if pa.types.is_primitive(values.type) else {"min": None, "max": None}
        least, most = extremes["min"], extremes["max"]
        if dimensions > 2 and (not pa.types.is_integer(values.type) or not 0 <= (least or 0) <= (most or 0) <= 255):
            raise UsageError(
                f"{what}, from {least} to {most}: in colour images these are whole numbers from 0, black, to 255, "
                "white. Scale them and store them as uint8."
            )
    try:
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's are among these
        raise UsageError(f"{what}, no images: {error}") from error
    return _files(rows, image_column, name)


def _files(rows: "datasets.Dataset", image_column: str, name: str) -> "datasets.Dataset":
    """`rows`. Raises UsageError where the first ones are all URLs: nothing is downloaded in a training step."""
    stored = [image for image in rows[: min(8, len(rows))][image_column] if image]
    if stored and all(not image["bytes"] and is_url(image["path"]) for image in stored):
        raise UsageError(
            f"--image_column {image_column}: {name} holds URLs there, such as {stored[0]['path']}. Download the "
            "images first, with img2dataset for instance, and give their folder."
        )
    return rows


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of one length or of several."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _without_decoder(feature):
    """The same feature, images, sounds and videos in it as files."""
    if isinstance(feature, dict):
        return {name: _without_decoder(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_without_decoder(part) for part in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_without_decoder(feature.feature))
    is_file = pa.types.is_struct(getattr(feature, "pa_type", pa.null()))  # JSON, which decodes too, is none
    return dataclasses.replace(feature, decode=False) if is_file and getattr(feature, "decode", False) else feature
