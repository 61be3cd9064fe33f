"""A table in a CSV file: a column to predict from the others, numbers and names alike.

A column whose values are all numbers is one, standardised by the rows that are trained on; one without a
number among its values holds names, and becomes a column of 0 and 1 for each name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from gaccum_exp.data.sequences import check_choice
from gaccum_exp.data.tensors import tensor_dataset
from gaccum_exp.errors import BadInputError, first_line, nearest, with_extra

SPLITS = ("train", "test")
SEPARATORS = (";", "\t", "|", ",")
TASKS = ("classification", "regression")
MOST_NAMES = 1000
"""Of one column: beyond it, it is a text or a number of its own for every row."""

_EMPTY = "is empty; its first line is to hold the columns' names"


def csv(
    split: str,
    file: str,
    target: str,
    task: str = "classification",
    features: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    eval_file: str | None = None,
    eval_fraction: float = 0.2,
    split_seed: int = 0,
    separator: str = ",",
) -> TensorDataset:
    """Return the rows to train on or those held out: (features,) float32, and the target.

    Args:
        split: `train` or `test`.
        file: in UTF-8, with the columns' names in the first line.
        target: the column to predict: its values are the classes, or with `regression` a number, (1,)
            float32, as it is.
        task: `classification` or `regression`.
        features: the columns to predict it from; null: all others.
        categorical: columns of numbers that are names, such as codes.
        eval_file: with the rows to hold out, and the same columns; null: a part of `file`.
        eval_fraction: which part of `file` is held out where there is no second file.
        split_seed: draws the rows of that part, from a generator of its own.
        separator: between columns.

    Numbers are (x - mean) / std of the rows to train on; one that is the same in all of these is 0.
    Names, and classes, are those of both splits. Raises `BadInputError` with line and column where a
    value is missing or not a number among numbers, and where a column or a file is missing.
    """
    check_choice("split", split, SPLITS)
    check_choice("task", task, TASKS)
    tables = [_Table(file, separator)]
    if eval_file is not None:
        tables.append(_Table(eval_file, separator))
    chosen = [c for c in tables[0].columns if c != target] if features is None else list(features)
    if not chosen or target in chosen:
        raise BadInputError(
            f"data.features={chosen}: there must be one at least, and data.target={target} none of them"
        )
    for table in tables:
        table.require("data.target", [target])
        table.require("data.features", chosen)
        table.require("data.categorical", categorical)
    rows = _rows(tables, eval_fraction, split_seed)
    which = SPLITS.index(split)
    if not len(rows[which]):
        raise BadInputError(
            f"data.eval_fraction={eval_fraction} holds out no row: raise it, or set "
            "data.eval._target_=null"
        )
    parts = [_encoded(tables, column, column in categorical, rows[0]) for column in chosen]
    inputs = np.column_stack(parts)[rows[which]]
    if task == "regression":
        numbers = _numbers(tables, target, required=True)
        assert numbers is not None
        targets = torch.from_numpy(numbers[rows[which]]).to(torch.float32).unsqueeze(1)
        return tensor_dataset(torch.from_numpy(inputs), targets, [target])
    classes, labels = _names(tables, target)
    return tensor_dataset(torch.from_numpy(inputs), _taken(labels, rows[which]), classes)


def _taken(labels: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(labels[rows])


class _Table:
    """The cells of a file as they are written, and where they stand in it."""

    def __init__(self, file: str, separator: str) -> None:
        with with_extra("data=csv", "pandas", "csv"):
            import pandas

        self.file = file
        path = Path(file).expanduser()
        if not path.is_file():
            raise BadInputError(f"data.file={file}: there is no file {path.absolute()}")
        as_written: dict[str, Any] = {
            "sep": separator, "header": None, "dtype": str, "encoding": "utf-8-sig",
            "na_filter": False, "skip_blank_lines": False, "skipinitialspace": True,
        }  # fmt: skip
        try:
            cells = pandas.read_csv(path, **as_written).to_numpy(dtype=object)
        except pandas.errors.EmptyDataError:
            raise BadInputError(f"{file}: {_EMPTY}") from None
        except UnicodeDecodeError as error:
            raise BadInputError(f"{file}: is not UTF-8 (byte {error.start})") from None
        except (pandas.errors.ParserError, ValueError) as error:
            said = first_line(error).rpartition("error: ")[2]
            raise BadInputError(
                f"{file}: {said}; data.separator={separator!r} is what is between columns"
            ) from None
        # A cell in quotes may hold line ends; a row begins after all those before it.
        ends = np.array([1 + sum(str(cell).count("\n") for cell in row) for row in cells])
        lines = 1 + np.cumsum(ends) - ends
        filled = np.array([any(str(cell).strip() for cell in row) for row in cells])
        cells, lines = cells[filled], lines[filled]
        if not len(cells):
            raise BadInputError(f"{file}: {_EMPTY}")
        self.columns = [str(name).strip() for name in cells[0]]
        self._cells, self._lines = cells[1:], lines[1:]
        twice = next((c for n, c in enumerate(self.columns) if c in self.columns[:n]), None)
        if twice is not None:
            raise BadInputError(f"{file}: line {lines[0]} has two columns {twice!r}")
        if not len(self._cells):
            raise BadInputError(f"{file}: has no row below the columns' names")

    def __len__(self) -> int:
        return len(self._cells)

    def require(self, key: str, columns: Sequence[str]) -> None:
        """Refuse columns that are not there."""
        for column in columns:
            if column not in self.columns:
                (only, *others) = self.columns
                mark = next((mark for mark in SEPARATORS if mark in only and not others), None)
                way_out = nearest(column, self.columns)
                if mark is not None:
                    way_out = f"; data.separator={mark!r} says what is between columns"
                raise BadInputError(
                    f"{key}={column}: {self.file} has no such column (it has {', '.join(self.columns)})"
                    f"{way_out}"
                )

    def column(self, name: str) -> list[str]:
        """Return a column's cells, none of which is empty."""
        cells = [str(cell).strip() for cell in self._cells[:, self.columns.index(name)]]
        if "" in cells:
            self.refuse(
                name, cells.index(""), "is empty: fill it in, or leave the row or the column out"
            )
        return cells

    def refuse(self, column: str, row: int, why: str) -> NoReturn:
        """Refuse a cell."""
        raise BadInputError(f"{self.file}, line {self._lines[row]}, column {column!r}: {why}")


def _rows(tables: Sequence[_Table], fraction: float, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows to train on and those held out, counted over all tables."""
    first = len(tables[0])
    if first < 2:
        raise BadInputError(
            f"{tables[0].file}: has one row, and nothing can be learned or held out from that"
        )
    if len(tables) > 1:
        return [np.arange(first), np.arange(first, first + len(tables[1]))]
    if not 0 <= fraction < 1:
        raise BadInputError(f"data.eval_fraction={fraction} must be at least 0 and below 1")
    held = 0 if fraction == 0 else min(max(1, round(first * fraction)), first - 1)
    drawn = torch.randperm(first, generator=torch.Generator().manual_seed(seed)).numpy()
    return [np.sort(drawn[held:]), np.sort(drawn[:held])]


def _encoded(
    tables: Sequence[_Table], column: str, are_names: bool, train: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return a column of all rows as (rows, numbers): one that is standardised, or one for each name."""
    numbers = None if are_names else _numbers(tables, column)
    if numbers is None:
        names, indices = _names(tables, column)
        if len(names) > MOST_NAMES:
            raise BadInputError(
                f"column {column!r}: holds {len(names):,} names, more than {MOST_NAMES:,}: leave it out "
                "of data.features"
            )
        return np.eye(len(names), dtype=np.float32)[indices]
    mean, std = float(numbers[train].mean()), float(numbers[train].std())
    standardised: NDArray[np.float32] = ((numbers - mean) / (std or 1.0)).astype(np.float32)
    return standardised[:, None]


def _numbers(
    tables: Sequence[_Table], column: str, required: bool = False
) -> NDArray[np.float64] | None:
    """Return a column of all rows as numbers; None where none of its values is one."""
    cells = [table.column(column) for table in tables]
    values = [[_number(cell) for cell in of_table] for of_table in cells]
    if not required and all(value is None for of_table in values for value in of_table):
        return None
    for table, of_table, written in zip(tables, values, cells, strict=True):
        for row, value in enumerate(of_table):
            if value is None or not np.isfinite(value):
                way_out = (
                    "" if required else f"; data.categorical=[{column}] takes all of them for names"
                )
                table.refuse(column, row, f"{written[row]!r} is no number, as others in it are{way_out}")
    return np.array([value for of_table in values for value in of_table], dtype=np.float64)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _names(tables: Sequence[_Table], column: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names in a column, numbers in their order, and each row's place among them."""
    cells = [cell for table in tables for cell in table.column(column)]
    numbers = {name: _number(name) for name in set(cells)}
    if all(number is not None for number in numbers.values()):
        names = sorted(numbers, key=lambda name: (numbers[name], name))
    else:
        names = sorted(numbers)
    place = {name: index for index, name in enumerate(names)}
    return names, np.array([place[cell] for cell in cells], dtype=np.int64)
