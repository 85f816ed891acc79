# SPDX-License-Identifier: Apache-2.0
"""metadata.csv, metadata.jsonl or metadata.parquet beside image files: captions and other columns, by `file_name`.

Read as the `imagefolder` loader of the datasets library reads them.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from utils.command_line import UsageError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # the column; x_file_name makes a column x of images too


def read_metadata(files: Sequence[str], flag: str) -> tuple[pa.Table, list[str]]:
    """(the rows of all files, one after the other; which columns are images). A name of a file becomes its absolute
    path: `file_name` in the column `image`, `x_file_name` in `x`.

    Raises:
        UsageError: a file that cannot be read, several kinds, no column of names, or a name outside of the folder.
    """
    kinds = {os.path.splitext(file)[1] for file in files}
    if len(kinds) > 1:
        raise UsageError(f"{flag}: metadata files of several kinds, {', '.join(files)}. Keep those of one.")
    tables = []
    for file in files:
        try:
            table = _read(file)
        except Exception as error:  # pandas and pyarrow raise many kinds for a file that is not what its name says
            raise UsageError(f"{flag}: {file} cannot be read: {error}") from error
        names = [name for name in table.column_names if name == FILE_NAME or name.endswith(f"_{FILE_NAME}")]
        if not names:
            raise UsageError(
                f"{flag}: {file} has no column {FILE_NAME}, only {', '.join(table.column_names)}. Name the image of "
                "each row in it."
            )
        for name in names:
            paths = [_absolute(value, file, flag) for value in table[name].to_pylist()]
            place = table.column_names.index(name)
            column = "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")
            table = table.set_column(place, pa.field(column, pa.string()), pa.array(paths, pa.string()))
        tables.append((table, names))
    try:
        together = pa.concat_tables([table for table, _ in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise UsageError(f"{flag}: {', '.join(files)} do not go together: {error}") from error
    named = dict.fromkeys(name for _, names in tables for name in names)
    return together, ["image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}") for name in named]


def _read(file: str) -> pa.Table:
    if file.endswith(".csv"):
        return pa.Table.from_pandas(pd.read_csv(file), preserve_index=False).replace_schema_metadata(None)
    if file.endswith(".parquet"):
        return pyarrow.parquet.read_table(file, partitioning=None)
    content = Path(file).read_bytes()
    block = pyarrow.json.ReadOptions(block_size=max(len(content), 1))  # one, so that a type is of all its rows
    return pyarrow.json.read_json(io.BytesIO(content), read_options=block)


def _absolute(name: str | None, file: str, flag: str) -> str | None:
    if name is None:
        return None
    folder = os.path.dirname(file)
    path = os.path.normpath(os.path.join(folder, name)) if isinstance(name, str) else ""
    if not path.startswith(folder + os.sep):
        raise UsageError(
            f"{flag}: {file} names {name!r}; a {FILE_NAME} is a path of a file below the folder of the metadata."
        )
    return path
