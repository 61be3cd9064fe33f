"""A file of a report is there whole, or not at all."""

from pathlib import Path

import pytest

from gaccum_exp.report.whole_files import whole


def broken_off(path: Path) -> None:
    """Write a file, and be interrupted."""
    with whole(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, "before"])
def test_writing_that_is_broken_off_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    """And nothing beside it; what is written to its end takes its place."""
    path = tmp_path / "report.html"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        broken_off(path)
    assert [found.read_text() for found in tmp_path.iterdir()] == ([] if before is None else [before])
    with whole(path) as beside:
        assert beside.suffix == path.suffix, "by which matplotlib knows what to write"
        beside.write_text("all of it")
    assert [(found, found.read_text()) for found in tmp_path.iterdir()] == [(path, "all of it")]
