"""Rows from a local JSONL or Parquet file, a directory of them, or the Hugging Face hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx

from atmanrl.config import DataConfig
from atmanrl.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet")


class DataError(InputError):
    """Data that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from unless the configuration says otherwise, and the columns they must have."""

    path: str
    subset: str
    train_split: str
    test_split: str
    columns: tuple[str, ...]


def load_splits(
    config: DataConfig, source: Source, convert: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and test rows of ``config``, each passed through ``convert``.

    ``convert`` raises ValueError for a row it cannot use; the message is reported with the row's file and line.

    Raises:
        DataError: see `atmanrl.tasks.load_task`.
    """
    path = config.path or source.path
    train_split = config.train_split or source.train_split
    test_split = config.test_split or source.test_split
    if _is_local(path):
        train, test = _local_splits(Path(path), config, train_split, test_split)
    else:
        subset = config.subset or source.subset
        train = _hub_rows(path, subset, train_split, source.columns)
        test = _hub_rows(path, subset, test_split, source.columns)
    converted = [[_convert(row, source.columns, convert) for row in rows] for rows in (train, test)]
    limits = (config.train_limit, config.test_limit)
    chosen = [_limit(rows, limit, config.seed) for rows, limit in zip(converted, limits, strict=True)]
    return datasets.Dataset.from_list(chosen[0]), datasets.Dataset.from_list(chosen[1])


@dataclass(frozen=True)
class Row:
    """A row and where it stands ("train.jsonl, line 3")."""

    place: str
    values: Mapping[str, Any]


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.endswith(SUFFIXES) or path.startswith((".", "/", "~"))


def _local_splits(path: Path, config: DataConfig, train_split: str, test_split: str) -> tuple[list[Row], list[Row]]:
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if path.is_dir():
        train, test = _split_rows(path, train_split), _split_rows(path, test_split, optional=True)
    else:
        train, test = list(_file_rows(path)), []
    if config.test_path is not None:
        test = list(_file_rows(Path(config.test_path).expanduser()))
    if not test:
        train, test = _hold_out(path, train, config)
    return train, test


def _split_rows(directory: Path, split: str, *, optional: bool = False) -> list[Row]:
    names = [f"{split}{middle}{suffix}" for middle in ("", "-*") for suffix in SUFFIXES]
    files = sorted(file for name in names for file in directory.glob(name))
    if not files and not optional:
        found = ", ".join(sorted(file.name for file in directory.iterdir())) or "nothing"
        raise DataError(f"{directory}: no file {split}.jsonl, {split}.json or {split}.parquet; found {found}")
    return [row for file in files for row in _file_rows(file)]


def _hold_out(path: Path, rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row]]:
    if len(rows) < 2:
        raise DataError(f"{path}: {len(rows)} row, too few to hold out test rows; pass test_path")
    held_out = max(1, round(config.test_fraction * len(rows)))
    order = random.Random(config.seed).sample(range(len(rows)), len(rows))
    test, train = sorted(order[:held_out]), sorted(order[held_out:])
    return [rows[i] for i in train], [rows[i] for i in test]


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from json_rows(path)
    else:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; known are {', '.join(SUFFIXES)}")


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, one per line; blank lines are skipped.

    Raises:
        DataError: for a line that is not UTF-8 or no JSON object, with file and line, and for a file without rows.
    """
    empty = True
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise DataError(f"{place}: not UTF-8 (byte 0x{byte:02x} at position {error.start})") from error
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}); one object per line") from error
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(values).__name__}")
        empty = False
        yield Row(place, values)
    if empty:
        raise DataError(f"{path}: holds no rows")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    if not table.num_rows:
        raise DataError(f"{path}: holds no rows")
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(f"{path}, row {number}", values)


def _hub_rows(path: str, subset: str, split: str, columns: Sequence[str]) -> list[Row]:
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise DataError(
            f"could not load {path!r} ({subset}, split {split}) from the Hugging Face hub: {error}. Without a "
            f"connection, set data.path to a local JSONL or Parquet file, or a directory with {split}.jsonl, of rows "
            f"with the columns {', '.join(columns)}"
        ) from error
    return [Row(f"{path} ({subset}, {split}), row {i}", values) for i, values in enumerate(rows, start=1)]


def _convert(
    row: Row, columns: Sequence[str], convert: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    missing = [name for name in columns if name not in row.values]
    if missing:
        found = ", ".join(row.values) or "none"
        raise DataError(f"{row.place}: lacks the column {', '.join(missing)}; found {found}")
    try:
        return convert(row.values)
    except ValueError as error:
        raise DataError(f"{row.place}: {error}") from error


def _limit(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
