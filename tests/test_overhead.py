"""The overhead study times one training in all of its ways, and its page shows what was measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT

pytest.importorskip("lightning", reason="the extra `peers` is not installed")

from experiments.overhead import one_run  # it imports the peers
from experiments.overhead.contenders import CONTENDERS, Block, bare

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
PAGE = ROOT / "experiments" / "overhead" / "README.md"


@pytest.mark.slow
def test_every_contender_trains_to_the_weights_of_the_bare_loop(tmp_path: Path) -> None:
    """In float64, to 1e-10; else the times would be of different trainings."""
    one_run.check(str(tmp_path))


def test_a_contender_that_trains_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that divides by another N."""

    def twice_the_gradient(block: Block) -> Callable[[], None]:
        for group in block.optimizer.param_groups:
            group["lr"] *= 2
        return bare(block)

    for name in list(CONTENDERS)[1:]:
        monkeypatch.delitem(CONTENDERS, name)
    monkeypatch.setitem(CONTENDERS, "other", twice_the_gradient)
    with pytest.raises(RuntimeError, match="other trains to other weights"):
        one_run.check(str(tmp_path))


def test_the_page_shows_what_was_measured() -> None:
    """Every table is that of `measured.json`, with its commit, versions and hardware."""
    measured = json.loads(PAGE.with_name("measured.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert len(measured) == 10
    for part in measured.values():
        assert part["table"] in page
        assert part["from"] in page
        assert "cores" in part["from"]
