"""What an audit prints, and where."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.result import Audit, Culprit
from gaccum_exp.audit.watch.watch import Watched
from gaccum_exp.memory import available
from tests.audit.support import CE, HIDDEN, net, window

BIASED = Audit(
    "biased", 4, "mean", e64=0.5, e=0.5, floor=1e-8, cause="loss scale", remedy="divide", detail="why"
)
OPEN = Audit("inconclusive", 4, "mean", e64=2.7e-16, e=1e-7, floor=1e-7, detail="a part is not seen")


def shown(audit: object) -> str:
    """Return what IPython, and with it a notebook, shows of an object."""
    lines: list[str] = []
    audit._repr_pretty_(SimpleNamespace(text=lines.append), False)  # type: ignore[attr-defined]
    return "".join(lines)


def test_an_audit_prints_as_its_report() -> None:
    """By `print`, in a notebook, and in a list of a callback's audits, there on one line."""
    assert str(BIASED) == shown(BIASED) == BIASED.report()
    assert BIASED.report().splitlines()[1:] == ["cause: loss scale", "remedy: divide", "seen: why"]
    assert "cause: loss scale; remedy: divide" in str([(0, BIASED)])
    assert "\n" not in repr(BIASED)


def test_watched_windows_print_as_the_worst_of_them() -> None:
    """In all these ways too."""
    watched = Watched()
    watched.windows += [OPEN, BIASED]
    assert str(watched) == shown(watched) == BIASED.report()
    assert repr(watched) == repr(BIASED)


def test_an_inconclusive_audit_gives_its_reason_and_no_numbers() -> None:
    """An e64 of rounding would read like a good result."""
    assert OPEN.report() == "inconclusive (N = 4, mean): a part is not seen"


def test_culprits_of_one_type_are_counted() -> None:
    """Those beside the first, by type and cause; one alone by its name."""
    mixing = [Culprit(f"norm.{i}", "BatchNorm2d", "batch statistics") for i in range(3)]
    drawing = [Culprit(f"drop.{i}", "StochasticDepth", "randomness") for i in range(31)]
    alone = Culprit("last", "Dropout", "randomness")
    culprits = (*mixing, *drawing, alone)
    audit = Audit("biased", 2, "mean", culprit="norm.0", culprits=culprits, cause="batch statistics")
    assert "also: 2 of type BatchNorm2d: batch statistics, 31 of type StochasticDepth: randomness, " in (
        audit.report()
    )
    assert 'module "last" (Dropout): randomness' in audit.report()


@pytest.mark.parametrize("norms", [1, 3])
def test_a_model_that_mixes_and_draws_is_told_both_with_counts(norms: int) -> None:
    """What to do about the statistics, and that it is stochastic after that."""
    middle = [nn.BatchNorm1d(HIDDEN) for _ in range(norms)] + [nn.Dropout(), nn.Dropout(0.1)]
    found = audit_window(net(*middle), CE, window(4, 4))
    assert (found.verdict, found.cause) == ("biased", "batch statistics")
    every = " (3 modules)" if norms == 3 else ""
    assert found.remedy == (
        f"replace BatchNorm1d{every} by GroupNorm, or freeze its statistics; what then "
        "differs is chance, no fault (2 modules of type Dropout)"
    )


def test_another_bias_of_a_model_that_draws_is_told_with_what_is_left() -> None:
    """A loss that couples samples, behind dropout."""

    def coupled(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
        out = model(batch[0])
        return (out - out.mean(0)).square().sum(), len(out)

    found = audit_window(net(nn.Dropout()), coupled, window(4, 4))
    assert found.verdict == "biased", str(found)
    assert "what then differs is chance, no fault (1 module of type Dropout)" in (found.remedy or "")


@pytest.mark.parametrize(("free", "level"), [(50_000, "WARNING"), (2**40, "DEBUG")])
def test_what_an_audit_needs_is_said_before(
    free: int, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, as a warning where it is a large part of what is free."""
    monkeypatch.setattr(available, "free_bytes", lambda device: free)
    monkeypatch.setattr(available, "MARGIN", 1.0)
    with caplog.at_level("DEBUG", logger=available.__name__):
        audit_window(net(), CE, window(64, 64))
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == available.__name__]
    assert len(said) == 1
    assert said[0][0] == level
    assert "an audit of 128 samples needs about" in said[0][1]
