"""The terms of a loss are compared, too."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gaccum_exp.report.compare.comparison import compare, write_csv
from gaccum_exp.tracking.records import RunRecord


def test_every_term_has_a_column_in_the_file(arm: Callable[..., RunRecord], tmp_path: Path) -> None:
    """Its last training and evaluation loss; blank for an arm without it."""
    box = {"train/loss/box": 0.25, "eval/loss/box": 0.5}
    runs = [arm(1), arm(2)]
    runs[1] = replace(runs[1], metrics={**runs[1].metrics, **box})
    path = write_csv(compare(runs), tmp_path / "comparison.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["train/loss/box"] for row in rows] == ["", "0.25"]
    assert [row["eval/loss/box"] for row in rows] == ["", "0.5"]
    assert list(rows[0])[-2:] == ["eval/loss/box", "train/loss/box"]
