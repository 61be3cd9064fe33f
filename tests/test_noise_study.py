"""The noise scale's study, shortened: what it calls exact is, and its page shows what was measured."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from experiments.noise_scale import cost, frozen, splits
from gaccum_exp.train.build import build
from tests.support import ROOT, settings

PAGE = ROOT / "experiments" / "noise_scale" / "README.md"


def test_what_all_samples_tell_is_what_a_loop_over_them_tells() -> None:
    """Their covariance's trace, and the squared norm of their mean; in chunks that do not divide."""
    state = build(settings("model=mlp", "model.hidden=[4]", "runtime.device=cpu", "train.steps=1"))
    inputs, labels = frozen.batch_of(state, torch.arange(11))
    gradients = []
    for x, y in zip(inputs, labels, strict=True):
        loss = F.cross_entropy(state.model(x[None]), y[None])
        of = torch.autograd.grad(loss, list(state.model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in of]).double())
    every = torch.stack(gradients)
    _, trace, squared_norm = frozen.sample_by_sample(state, inputs, labels, 4)
    assert math.isclose(trace, float(every.var(0).sum()), rel_tol=1e-6)
    assert math.isclose(squared_norm, float(every.mean(0).square().sum()), rel_tol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", frozen.CASES)
def test_a_checkpoint_is_looked_at_and_left_as_it_was(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of one, of few samples and windows."""
    monkeypatch.setattr(frozen, "SAMPLES", 96)
    monkeypatch.setattr(frozen, "WINDOWS", 8)
    (found,) = frozen.checkpoints(model, 0, steps=0)
    assert found.exact > 0
    assert found.trace == pytest.approx(found.exact_trace, rel=0.2)
    assert found.low < found.scale


def test_the_cost_is_a_ratio_for_each_model_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of windows in turn."""
    monkeypatch.setattr(cost, "MODELS", {"MLP": cost.MODELS["MLP"]})
    found = cost.measured(rounds=1, windows=12)
    assert set(found) == {("MLP", optimizer) for optimizer in cost.OPTIMIZERS}
    assert all(of.window > 0 and of.check > 0 for (of,) in found.values())
    assert cost.table(found).count("\n") == 1 + len(found)


def test_over_splits_of_a_window_the_mean_is_what_its_samples_tell() -> None:
    """A few of the study's splits, of its smallest model."""
    assert max(map(abs, splits.standard_errors("MLP", splits=12, batch=40))) < 4


def test_the_page_has_its_numbers() -> None:
    """Answer, figure, tables and the commit that measured them."""
    page = PAGE.read_text(encoding="utf-8")
    for word in ("Question", "Command", "Runtime", "Answer", "What it shows", "What it does not show"):
        assert word in page
    assert re.search(r"Commit [0-9a-f]{40}", page)
    assert "TO WRITE" not in page
    assert (PAGE.parent / "noise_scale.png").stat().st_size > 10_000
