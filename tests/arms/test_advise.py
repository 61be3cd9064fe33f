"""`task=advise`: the ways to a global batch, planned, tried and audited."""

import json

import pytest

from tests.program import Program

SMALL = ("model=mlp", "model.hidden=[32,16]", "data.global_batch_size=32", "train.epochs=2")


@pytest.mark.slow
def test_ways_are_planned_tried_and_weighed_by_what_runs_have_told(program: Program) -> None:
    """First without runs, then with a noise scale and losses of the same batch."""
    assert program("task=advise", *SMALL).status == 0
    (path,) = program.folder.glob("outputs/*/advice.json")
    first = json.loads(path.read_text())
    ways = {tuple(way["overrides"]): way for way in first["ways"]}
    assert first["noise"] is None
    assert ways[()]["exact"]
    assert ways["accum.steps=4",]["verdict"] == "equivalent"
    assert ways["accum.steps=4",]["peak_bytes"] < ways[()]["peak_bytes"]
    assert all(way["sample_s"] > 0 for way in first["ways"] if way["failure"] is None)
    assert not ways["runtime.precision=bf16",]["exact"]
    (half,) = (way for key, way in ways.items() if "data.global_batch_size=16" in key)
    assert "train.lr_rule=linear" in half["overrides"]
    assert "train.base_batch_size=32" in half["overrides"]
    assert "has told its noise scale" in first["why"]

    assert program(*SMALL, "accum.steps=8", "noise.every_steps=1").status == 0
    ended = program("task=advise", *SMALL)
    assert ended.status == 0
    second = json.loads(
        max(program.folder.glob("outputs/*/advice.json"), key=lambda p: p.stat().st_mtime).read_text()
    )
    assert second["noise"]["scale"] > 0
    assert all(way["objective_s"] for way in second["ways"] if way["sample_s"])
    told = {tuple(way["overrides"]): way["runs"] for way in second["ways"]}
    assert told[()] == told["accum.steps=4",] == 1
    assert told["runtime.precision=bf16",] == 0
    assert "Recommended: " in ended.plain


def test_what_cannot_be_taken_is_said_with_its_reason(program: Program) -> None:
    """A model without blocks has nothing to checkpoint; of what does not fit nothing is tried."""
    ended = program("task=advise", *SMALL, "model.hidden=[]", "runtime.memory_budget_gib=1e-7")
    assert ended.status == 0
    assert "has no blocks" in ended.plain
    assert "Nothing is recommended: no way fits the memory that there is." in ended.plain


def test_a_batch_that_changes_has_no_ways_of_its_own(program: Program) -> None:
    """It is refused before anything is loaded."""
    for key in ("accum.grow=auto", "'accum.schedule={0:1,1:2}'"):
        ended = program("task=advise", *SMALL, "scheduler=cosine", key.strip("'"))
        assert ended.status == 2
        assert "shows the ways to one global batch" in ended.plain
