"""A table of the user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gaccum_exp.data.csv import csv
from gaccum_exp.errors import BadInputError
from tests.support import settings
from tests.unimportable import unimportable

FLOWERS = """petal,colour,code,species
1.0,red,7,iris
2.0,blue,8,rose

3.0,red,7,iris
4.0,"deep
blue",9,rose
5.0,red,8,iris
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Five rows with numbers, names and codes; one is blank, and one goes over two lines."""
    (tmp_path / "flowers.csv").write_text(FLOWERS)
    return tmp_path / "flowers.csv"


def split(table: Path, which: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    dataset = csv(which, str(table), **({"target": "species"} | options))
    return (*dataset.tensors, dataset.classes)


def test_numbers_are_standardised_by_the_rows_that_are_trained_on(table: Path) -> None:
    """Whatever the held-out rows are, the others have mean 0 and deviation 1; names are 0 and 1."""
    inputs, targets, classes = split(table, "train", features=["petal", "colour"])
    held, held_targets, _ = split(table, "test", features=["petal", "colour"])
    assert (len(inputs), len(held)) == (4, 1)
    torch.testing.assert_close(inputs[:, 0].mean(), torch.tensor(0.0))
    torch.testing.assert_close(inputs[:, 0].std(correction=0), torch.tensor(1.0))
    assert inputs[:, 1:].unique().tolist() == [0, 1]
    assert inputs.shape[1] == 1 + 3
    assert classes == ["iris", "rose"]
    assert sorted([*targets.tolist(), *held_targets.tolist()]) == [0, 0, 0, 1, 1]


def test_the_seed_of_the_split_and_a_second_file_decide_what_is_held_out(table: Path) -> None:
    """No number of the run's generator is drawn; a second file is held out whole."""
    state = torch.get_rng_state()
    held = {split(table, "test", split_seed=seed)[0].numpy().tobytes() for seed in range(8)}
    assert torch.equal(state, torch.get_rng_state())
    assert len(held) > 1
    other = table.with_name("other.csv")
    other.write_text("petal,colour,code,species\n9,green,7,iris\n")
    inputs, *_ = split(table, "train", eval_file=str(other))
    held_out, _, classes = split(table, "test", eval_file=str(other))
    assert (len(inputs), len(held_out), classes) == (5, 1, ["iris", "rose"])
    assert held_out[0, 0] > 2  # 9 is far above the mean of 1 to 5


def test_codes_are_names_where_that_is_said_and_a_number_can_be_the_target(table: Path) -> None:
    """A regression has one output, in the target's own unit."""
    plain = split(table, "train", features=["code"])[0]
    names = split(table, "train", features=["code"], categorical=["code"])[0]
    assert (plain.shape[1], names.shape[1]) == (1, 3)
    _, targets, classes = split(table, "train", target="petal", task="regression")
    assert targets.shape == (4, 1)
    assert targets.max() > 2
    assert classes == ["petal"]


BAD = {
    "a missing target": ({}, {"target": "specie"}, r"data\.target=specie: .*did you mean 'species'"),
    "a missing feature": ({}, {"features": ["pedal"]}, r"data\.features=pedal: .*did you mean 'petal'"),
    "the target among the features": ({}, {"features": ["species"]}, "none of them"),
    "an empty cell": ({"4.0,": ","}, {}, r"flowers\.csv, line 6, column 'petal': is empty"),
    "text among numbers": ({"5.0,": "five,"}, {}, r"line 8, column 'petal': 'five' is no number"),
    "NaN": ({"3.0,": "nan,"}, {}, r"line 5, column 'petal': 'nan' is no number"),
    "infinity": ({"3.0,": "inf,"}, {}, r"line 5, column 'petal': 'inf' is no number"),
    "a target that is no number": (
        {},
        {"task": "regression"},
        r"line 2, column 'species': 'iris' is no",
    ),
    "a row that is too long": ({"2.0,": "2.0,2.0,"}, {}, "line 3, saw 5"),
    "another separator": ({",": ";"}, {}, r"it has petal;colour.*data\.separator=';' says"),
    "a column twice": ({"code": "petal"}, {}, "two columns 'petal'"),
    "one row": ({FLOWERS[FLOWERS.index("2.0") :]: ""}, {}, "has one row"),
    "no row": ({FLOWERS[FLOWERS.index("1.0") :]: ""}, {}, "has no row below"),
    "an empty file": ({FLOWERS: ""}, {}, r"flowers\.csv: is empty"),
    "a split of everything": ({}, {"eval_fraction": 1.0}, r"data\.eval_fraction=1\.0 must be"),
    "another task": ({}, {"task": "regresion"}, r"data\.task=regresion .*did you mean 'regression'"),
    "no file": ({}, {"file": "nowhere.csv"}, r"data\.file=nowhere\.csv: there is no file"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_of_a_table_is_named_with_its_line_and_column(table: Path, fault: str) -> None:
    """Blank lines, and line ends in a cell, are counted as an editor counts them."""
    replaced, options, said = BAD[fault]
    text = FLOWERS
    for old, new in replaced.items():
        text = text.replace(old, new)
    table.write_text(text)
    arguments = {"file": str(table), "target": "species"} | options
    with pytest.raises(BadInputError, match=said) as raised:
        csv("train", **arguments)
    assert "\n" not in str(raised.value)


def test_holding_out_nothing_is_refused_for_the_held_out_part_alone(table: Path) -> None:
    """The training part is then the whole file."""
    assert len(split(table, "train", eval_fraction=0)[0]) == 5
    with pytest.raises(BadInputError, match=r"data\.eval\._target_=null"):
        split(table, "test", eval_fraction=0)


def test_without_pandas_the_extra_is_named(table: Path) -> None:
    """In one line, as it is installed."""
    with unimportable("pandas"), pytest.raises(BadInputError) as raised:
        split(table, "train")
    assert str(raised.value) == "data=csv: needs pandas: pip install 'gaccum_exp[csv]'"


def test_a_block_without_its_file_is_refused_by_its_key() -> None:
    """Before anything is read."""
    with pytest.raises(BadInputError, match=r"data\.file must be set"):
        settings("data=csv", "data.target=species")
