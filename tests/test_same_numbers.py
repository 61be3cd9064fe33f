"""The proof that a refactoring moves no number: what it finds, what it leaves aside, that it runs."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments import same_numbers

COMMAND = "-m accum.steps=1,3"
BEFORE: dict[str, Any] = {
    "reductions": {
        COMMAND: {
            "status": 0,
            "comparison.csv": {"N=3": {"steps": "3", "train_loss": "0.1", "step_s": "0.5"}},
            "runs": {
                "N=3": {
                    "status": "FINISHED",
                    "params": {"accum.steps": "3", "model._target_": "gaccum_exp.models.mlp.MLP"},
                    "tags": {"verdict": "equivalent", "host": "here"},
                    "metrics": {
                        "train/loss": {"1": 0.3, "2": 0.1},
                        "eval/loss": {"2": math.nan},
                        "time/step_s": {"2": 0.5},
                    },
                    "weights": "0123",
                }
            },
        }
    }
}


def run_of(file: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = file["reductions"][COMMAND]["runs"]["N=3"]
    return found


def compared(after: dict[str, Any], folder: Path) -> int:
    """Return the exit status of comparing the file above with this one."""
    for name, found in (("before", BEFORE), ("after", after)):
        (folder / name).write_text(json.dumps(same_numbers.exact(found)))
    return same_numbers.main(["compare", str(folder / "before"), str(folder / "after")])


@pytest.fixture
def after() -> dict[str, Any]:
    return copy.deepcopy(BEFORE)


def test_equal_files_are_the_same(
    after: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A NaN is one on both sides."""
    assert compared(after, tmp_path) == 0
    assert "The same, bit for bit" in capsys.readouterr().out


def test_one_changed_bit_is_found(
    after: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the run, the metric, the step and both values."""
    changed = math.nextafter(0.1, 1)
    run_of(after)["metrics"]["train/loss"]["2"] = changed
    assert compared(after, tmp_path) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"reductions / {COMMAND} / runs / N=3 / metrics / train/loss / 2: ")
    assert line.endswith(f"0.1 ({(0.1).hex()}) before, {changed!r} ({changed.hex()}) after")


def test_the_sign_of_a_zero_and_the_type_of_a_number_are_found() -> None:
    """Though Python calls them equal."""
    assert list(same_numbers.differences(*map(same_numbers.exact, ([0.0, 1], [-0.0, 1.0])))) == [
        f"0: 0.0 ({(0.0).hex()}) before, -0.0 ({(-0.0).hex()}) after",
        f"1: 1 before, 1.0 ({(1.0).hex()}) after",
    ]


@pytest.mark.parametrize(
    ("gone", "said"), [("run", "runs / N=3"), ("metric", "metrics / eval/loss"), ("step", "loss / 2")]
)
def test_what_one_side_lacks_is_found(
    after: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str, said: str
) -> None:
    """A run, a metric, a value of a curve."""
    of = {
        "run": after["reductions"][COMMAND]["runs"],
        "metric": run_of(after)["metrics"],
        "step": run_of(after)["metrics"]["train/loss"],
    }[gone]
    del of[{"run": "N=3", "metric": "eval/loss", "step": "2"}[gone]]
    assert compared(after, tmp_path) == 1
    assert capsys.readouterr().out.endswith(f"{said}: only before\n")


def test_times_places_and_renamed_keys_are_no_difference(after: dict[str, Any], tmp_path: Path) -> None:
    """Nor is the room that a `_target_` has moved to; a dotted key is another one."""
    run_of(after)["metrics"]["time/step_s"]["2"] = 0.7
    run_of(after)["tags"]["host"] = "there"
    run_of(after)["params"]["model._target_"] = "gaccum_exp.rooms.mlp.MLP"
    row = after["reductions"][COMMAND]["comparison.csv"]["N=3"]
    row |= {"accum_steps": row.pop("steps"), "step_s": "0.7"}
    assert compared(after, tmp_path) == 0
    run_of(after)["params"]["accum_steps"] = run_of(after)["params"].pop("accum.steps")
    assert compared(after, tmp_path) == 1


@pytest.mark.slow
def test_a_group_is_run_and_has_finite_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is recorded of a command: files, parameters, curves, weights."""
    small = "-m model=mlp model.hidden=[8] train.steps=3 accum.steps=1,3 audit.at_start=false"
    monkeypatch.setitem(same_numbers.COMMANDS, "reductions", (small,))
    assert same_numbers.main(["write", str(tmp_path / "found"), "--only", "reductions"]) == 0
    found = json.loads((tmp_path / "found").read_text())["reductions"][small]
    assert found["status"] == 0
    assert len(found["comparison.csv"]) == len(found["runs"]) == 2
    for run in found["runs"].values():
        assert run["status"] == "FINISHED"
        assert len(run["weights"]) == 64
        assert [*run["metrics"]["train/loss"]] == ["1", "2", "3"]
        values = [float.fromhex(v) for curve in run["metrics"].values() for v in curve.values()]
        assert all(map(math.isfinite, values))
