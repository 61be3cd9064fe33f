"""A loop with several faults is told of all, the strongest first, with the lines to be mended."""

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import watch
from gaccum_exp.audit.result import Audit

N = 4
FOLDER = "tests/audit/watch/"
WAYS = ("clipped", "undivided", "unequal", "normalized", "left over")
CAUSE = {
    "clipped": "loss scale",
    "undivided": "loss scale",
    "unequal": "unequal denominators",
    "normalized": "batch statistics",
    "left over": "stale or missing gradients",
}


def trained(*faults: str, bound: float = 0.3) -> Audit:
    """Return the audit of a window whose loop has these faults."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6) if "normalized" in faults else nn.LayerNorm(6)
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), norm), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = (6, 6, 6, 3) if "unequal" in faults else (6, 6, 6, 6)
    data = [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in sizes]
    criterion = nn.CrossEntropyLoss()
    if "left over" in faults:
        criterion(model(torch.randn(6, 5)), torch.randint(0, 3, (6,))).backward()
    with watch(model, criterion, optimizer) as found:
        for x, y in data:
            (criterion(model(x), y) / (1 if "undivided" in faults else N)).backward()
            if "clipped" in faults:
                nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
    return found.worst


def line(words: str) -> str:
    """Return where in this file the loop has these words."""
    lines, first = inspect.getsourcelines(trained)
    return f"{Path(__file__).name}:{first + next(i for i, text in enumerate(lines) if words in text)}"


@pytest.mark.parametrize(
    "faults",
    [of for n in (1, 2, 4) for of in itertools.combinations(WAYS[:4], n)]
    + [("clipped", "left over"), ("left over", "normalized")],
    ids=" and ".join,
)
def test_every_fault_of_a_loop_is_named_and_no_other(faults: tuple[str, ...]) -> None:
    """So that after a mend the next one is no surprise; what moves the gradient most is first."""
    audit = trained(*faults)
    findings = audit.findings
    assert audit.verdict == "biased"
    assert sorted(f.cause for f in findings) == sorted(CAUSE[fault] for fault in faults), str(audit)
    moves = [f.moves for f in findings]
    assert len(faults) > 1 or moves == [None]
    if len(faults) > 1:
        known = [m for m in moves if m is not None and math.isfinite(m)]
        assert known == sorted(moves, reverse=True), str(audit)  # type: ignore[type-var]  # none is None
        assert str(audit).count("remedy: ") == len(faults)


def test_remedies_name_the_lines_of_the_loop() -> None:
    """Of the backward pass where losses are weighed, of the clipping, and a module by its path."""
    said = str(trained("clipped", "unequal", "normalized")).replace(FOLDER, "")
    assert f"not after each micro-batch ({line('clip_grad_norm_')})" in said.replace(
        "tests/audit/watch/", ""
    )
    assert line(".backward()") != line("/ (1 if")  # that of the left-over pass
    assert f"(the backward pass: {line('/ (1 if')})" in said
    assert 'at module "0.1" (BatchNorm1d)' in said


@pytest.mark.parametrize(("bound", "said"), [(1e3, True), (math.inf, False)])
def test_a_clipping_that_does_not_bind_yet_is_told_without_a_verdict(bound: float, said: bool) -> None:
    """It will on other windows; one without a bound only asks for the norm."""
    audit = trained("clipped", bound=bound)
    assert audit.sound
    assert ("clipped inside the window" in (audit.detail or "")) is said
    assert not said or line("clip_grad_norm_") in str(audit).replace(FOLDER, "")


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("mixing", "causes"),
    [
        ([Centred()], 1),
        ([Centred(), nn.Linear(6, 6), Centred()], 1),
        ([nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6, track_running_stats=False)], 1),
        ([nn.BatchNorm1d(6), nn.Tanh(), Centred()], 2),
    ],
)
def test_what_stands_behind_a_module_that_cannot_be_frozen_is_said_to_be_unknown(
    mixing: list[nn.Module], causes: int
) -> None:
    """A module that mixes samples in evaluation, too, hides what the loss's weights do, and how much of
    the error is its own; it is named once for all of its type."""
    model = nn.Sequential(nn.Linear(5, 6), *mixing, nn.Linear(6, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    with watch(model, criterion, optimizer) as found:
        for n in (4, 3):
            batch = torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,))
            (criterion(model(batch[0]), batch[1]) / 2).backward()
        optimizer.step()
    findings = found.worst.findings
    assert [f.cause for f in findings] == ["batch statistics"] * causes
    assert findings[-1].moves is None
    assert "cannot be told while it mixes samples" in (findings[-1].detail or "")


def test_of_a_window_without_a_gradient_it_is_said_why_and_nothing_of_its_order() -> None:
    """All labels are ignored; or the gradient is zero, and either dimension may count samples."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    targets = torch.full((2, 4), -100), torch.full((2, 4), 0)
    said = []
    for target in targets:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, None, optimizer) as found:
            for labels, sign in zip(target, (1, -1), strict=True):
                loss = nn.functional.cross_entropy(model(torch.ones(4, 4)), labels, reduction="sum")
                (sign * loss).backward()
            optimizer.step()
        said.append((found.verdict, found.detail or ""))
    assert {verdict for verdict, _ in said} == {"inconclusive"}
    assert "all labels of the window are ignored" in said[0][1]
    assert "zero" in said[1][1]
    assert not any("order of the samples" in why for _, why in said)
