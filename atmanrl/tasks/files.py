"""Rows from a local JSONL or Parquet file, a directory of them, or the Hugging Face hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx

from atmanrl.config import DataConfig
from atmanrl.errors import InputError
from atmanrl.models import check_unicode

SUFFIXES = (".jsonl", ".json", ".parquet")
# Rows that cannot be used are counted; so many of them are named.
LISTED = 5


class DataError(InputError):
    """Data that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Source:
    """Default source and required columns of a task's rows."""

    path: str
    subset: str
    train_split: str
    test_split: str
    columns: tuple[str, ...]


def load_splits(
    config: DataConfig,
    source: Source,
    convert: Callable[[Mapping[str, Any]], dict[str, Any]],
    left_out: list[str] | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and test rows of ``config``, each passed through ``convert``.

    ``convert`` raises ValueError for a row it cannot use. Every row is checked, and one error reports the messages with
    files and lines. Given ``left_out``, such rows are left out instead, and the messages about rows to test on are
    appended to it. The other rows then get a column "place", their file and line.

    Raises:
        DataError: see `atmanrl.tasks.load_task`.
    """
    path = config.path or source.path
    train_split = config.train_split or source.train_split
    test_split = config.test_split or source.test_split
    faults = _Faults([], [])
    if _is_local(path):
        train, test = _local_splits(Path(path).expanduser(), config, train_split, test_split, faults)
        if not test:
            if left_out is None:
                # Before some are held out, so that one error names all that cannot be used.
                list(_converted(train, source.columns, convert, faults.test))
                _refuse(faults)
            train, test = _hold_out(Path(path), train, config)
    else:
        subset = config.subset or source.subset
        train = _hub_rows(path, subset, train_split, source.columns)
        test = _hub_rows(path, subset, test_split, source.columns)
    converted = [
        list(_converted(train, source.columns, convert, faults.train, placed=left_out is not None)),
        list(_converted(test, source.columns, convert, faults.test, placed=left_out is not None)),
    ]
    if left_out is None:
        _refuse(faults)
    else:
        left_out += faults.test
    limits = (config.train_limit, config.test_limit)
    chosen = [_limit(rows, limit, config.seed) for rows, limit in zip(converted, limits, strict=True)]
    return datasets.Dataset.from_list(chosen[0]), datasets.Dataset.from_list(chosen[1])


@dataclass(frozen=True)
class _Faults:
    """Messages about rows that cannot be used, with their places."""

    train: list[str]
    test: list[str]


def _refuse(faults: _Faults) -> None:
    """One error for all rows that cannot be used: the first few, and how many there are."""
    # The same file may serve both splits.
    messages = list(dict.fromkeys(faults.train + faults.test))
    if len(messages) == 1:
        raise DataError(messages[0])
    if messages:
        listed = "".join(f"\n  {message}" for message in messages[:LISTED])
        more = f"\n  and {len(messages) - LISTED} more" if len(messages) > LISTED else ""
        raise DataError(f"{len(messages)} rows cannot be used:{listed}{more}")


@dataclass(frozen=True)
class Row:
    """A row and where it stands ("train.jsonl, line 3")."""

    place: str
    values: Mapping[str, Any]


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.endswith(SUFFIXES) or path.startswith((".", "/", "~"))


def _local_splits(
    path: Path, config: DataConfig, train_split: str, test_split: str, faults: _Faults
) -> tuple[list[Row], list[Row]]:
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if path.is_dir():
        train = _split_rows(path, train_split, faults.train)
        test = _split_rows(path, test_split, faults.test, optional=True)
    else:
        # Its lines are held out later, where no second file is given.
        train, test = list(_file_rows(path, faults.test if config.test_path is None else faults.train)), []
    if config.test_path is not None:
        test = list(_file_rows(Path(config.test_path).expanduser(), faults.test))
    return train, test


def _split_rows(directory: Path, split: str, left_out: list[str], *, optional: bool = False) -> list[Row]:
    names = [f"{split}{middle}{suffix}" for middle in ("", "-*") for suffix in SUFFIXES]
    files = sorted(file for name in names for file in directory.glob(name))
    if not files and not optional:
        found = ", ".join(sorted(file.name for file in directory.iterdir())) or "nothing"
        raise DataError(f"{directory}: no file {split}.jsonl, {split}.json or {split}.parquet; found {found}")
    return [row for file in files for row in _file_rows(file, left_out)]


def _hold_out(path: Path, rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row]]:
    if len(rows) < 2:
        raise DataError(f"{path}: {len(rows)} row, too few to hold out test rows; pass test_path")
    held_out = max(1, round(config.test_fraction * len(rows)))
    order = random.Random(config.seed).sample(range(len(rows)), len(rows))
    test, train = sorted(order[:held_out]), sorted(order[held_out:])
    return [rows[i] for i in train], [rows[i] for i in test]


def _file_rows(path: Path, left_out: list[str]) -> Iterator[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from json_rows(path, left_out)
    else:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; known are {', '.join(SUFFIXES)}")


def json_rows(path: Path, left_out: list[str] | None = None) -> Iterator[Row]:
    """The objects of a JSONL file, one per line; blank lines are skipped.

    Given ``left_out``, a line that is no object is left out, and the message about it is appended there.

    Raises:
        DataError: for a line that is not UTF-8 or no JSON object, with file and line, and for a file without rows.
    """
    empty = True
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        empty = False
        try:
            row = _json_row(f"{path}, line {number}", line, first=number == 1)
        except DataError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
            continue
        yield row
    if empty:
        raise DataError(f"{path}: holds no rows")


def _json_row(place: str, line: bytes, *, first: bool) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(f"{place}: not UTF-8 (byte 0x{byte:02x} at position {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}); one object per line") from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or lists nested as deep.
        raise DataError(f"{place}: JSON that cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(values).__name__}")
    try:
        check_unicode_values(values)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    return Row(place, values)


def check_unicode_values(values: Mapping[str, Any]) -> None:
    """Whether every text in a row, however deep, is Unicode.

    Raises:
        ValueError: naming the column and the position of half a surrogate pair.
    """
    for name, value in values.items():
        check_unicode(name, "a column's name")
        for text in _texts(value):
            check_unicode(text, f'"{name}"')


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for part in pair for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text of a column, without white space around it.

    Raises:
        ValueError: for anything but a text, and for an empty one.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a text, got {value!r}")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    return value.strip()


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


def _converted(
    rows: Iterable[Row],
    columns: Sequence[str],
    convert: Callable[[Mapping[str, Any]], dict[str, Any]],
    left_out: list[str],
    *,
    placed: bool = False,
) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            values = _convert(row, columns, convert)
        except DataError as error:
            left_out.append(str(error))
            continue
        # A row may still turn out not to fit a model; then it has to be found again.
        yield {**values, "place": row.place} if placed else values


def _convert(
    row: Row, columns: Sequence[str], convert: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    missing = [name for name in columns if name not in row.values]
    if missing:
        found = ", ".join(row.values) or "none"
        raise DataError(f"{row.place}: lacks the column {', '.join(missing)}; found {found}")
    try:
        check_unicode_values(row.values)
        return convert(row.values)
    except ValueError as error:
        raise DataError(f"{row.place}: {error}") from error


def _limit(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
