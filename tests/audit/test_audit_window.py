"""`audit_window`: its verdicts, and its numbers against naive loops."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.result import Audit
from gaccum_exp.core.reductions import Sum, reduction_named
from gaccum_exp.memory import available
from tests.audit.support import (
    CE,
    CLASSES,
    FEATURES,
    HIDDEN,
    Fn,
    naive,
    net,
    relative,
    whole,
    window,
)

SIZES = (4, 4, 3)
SOUND = ("equivalent", "identical")


def autocast_loss(model: nn.Module, micro_batch: Any) -> Any:
    inputs, labels = micro_batch
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


class BackwardMixes(torch.autograd.Function):
    """Forward each sample for itself, backward not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


class Parent(nn.Module):
    """Mixes in its own forward, between children that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        return self.after(hidden - hidden.mean(0))


class Many(nn.Module):
    """Shared and unused parameters, one module called twice, outputs in a dict of lists."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, FEATURES, sparse=True)
        self.twice = nn.Linear(FEATURES, FEATURES)
        self.tied = nn.Linear(FEATURES, FEATURES)
        self.tied.weight = self.twice.weight
        self.norm, self.unused = norm, nn.Linear(2, 2)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        hidden = self.embedding(batch["ids"]).mean(1) + self.frozen(batch["x"])
        hidden = self.norm(torch.tanh(self.tied(self.twice(torch.tanh(self.twice(hidden))))))
        return {"logits": [self.out(hidden), hidden]}


def many_loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    out = model(batch)["logits"][0]
    return F.cross_entropy(out, batch["label"], reduction="sum"), len(out)


def dicts(*sizes: int) -> list[dict[str, Tensor]]:
    return [
        {"ids": torch.randint(7, (len(y), 3)), "x": x, "label": y, "names": ["a"] * len(y)}  # type: ignore[dict-item]  # names are carried along
        for x, y in window(*sizes)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(HIDDEN), nn.GroupNorm(2, HIDDEN)])
def test_sound_models_are_equivalent_in_every_precision(norm: nn.Module, dtype: torch.dtype) -> None:
    """Also with parameters in half precision, where the floor is far higher."""
    found = audit_window(net(norm, dtype=dtype), CE, window(*SIZES, dtype=dtype))
    assert found.verdict in SOUND, found.report()
    assert found.e64 is not None
    assert found.e64 <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_norm_is_biased_in_every_precision(dtype: torch.dtype) -> None:
    """And named, with what would do instead."""
    found = audit_window(net(nn.BatchNorm1d(HIDDEN), dtype=dtype), CE, window(*SIZES, dtype=dtype))
    assert (found.verdict, found.cause) == ("biased", "batch statistics")
    assert (found.culprit, found.culprit_type) == ("1", "BatchNorm1d")
    assert found.remedy is not None
    assert "GroupNorm" in found.remedy


@pytest.mark.parametrize(
    ("middle", "verdict"),
    [
        (nn.Identity(), "equivalent"),
        (nn.LayerNorm(HIDDEN), "equivalent"),
        (nn.BatchNorm1d(HIDDEN), "biased"),
        (Fn(lambda x: x - x.mean(0)), "biased"),
        (nn.Dropout(), "stochastic"),
    ],
)
def test_verdicts_are_the_same_under_bf16_autocast(middle: nn.Module, verdict: str) -> None:
    """A loss function that enters autocast itself."""
    assert audit_window(net(middle), autocast_loss, window(*SIZES)).verdict == verdict


def test_a_parent_that_mixes_in_its_own_forward_is_the_culprit() -> None:
    """And none of its children."""
    found = audit_window(net(Parent()), CE, window(*SIZES))
    assert (found.verdict, found.culprit, found.culprit_type) == ("biased", "1", "Parent")


def test_a_model_that_mixes_at_its_top_is_named_by_the_empty_name() -> None:
    """As in `model.named_modules()`."""
    model = Parent()
    pairs = [(F.pad(x, (0, 1)), y) for x, y in window(*SIZES)]
    found = audit_window(model, CE, pairs)
    assert (found.verdict, found.culprit, found.culprit_type) == ("biased", "", "Parent")


def test_a_backward_pass_that_mixes_is_biased_though_every_output_agrees() -> None:
    """The forward comparison finds nobody, and nobody is blamed."""
    found = audit_window(net(Fn(BackwardMixes.apply)), CE, window(*SIZES))
    assert (found.verdict, found.cause, found.culprit) == ("biased", "unknown", None)


@pytest.mark.parametrize(
    ("norm", "verdict"),
    [
        (nn.LayerNorm(FEATURES), "equivalent"),
        (nn.BatchNorm1d(FEATURES), "biased"),
        (nn.BatchNorm1d(FEATURES).eval(), "equivalent"),
    ],
)
def test_what_models_have_beside_layers_changes_no_verdict(norm: nn.Module, verdict: str) -> None:
    """Shared, unused, frozen and sparse parameters, modules called twice, dicts in and out."""
    torch.manual_seed(0)
    found = audit_window(Many(norm), many_loss, dicts(*SIZES))
    assert found.verdict == verdict, found.report()
    assert found.culprit == ("norm" if verdict == "biased" else None)


def to_single(x: Tensor) -> Tensor:
    return x + x.float().exp().to(x.dtype)


def to_half(x: Tensor) -> Tensor:
    return x + x.half().to(x.dtype)


@pytest.mark.parametrize("cast", [to_single, to_half])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cast_inside_the_forward_is_never_a_bias(
    cast: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Equivalent where it can be undone, left open where not."""
    found = audit_window(net(Fn(cast), dtype=dtype), CE, window(*SIZES, dtype=dtype))
    assert found.verdict in (*SOUND, "inconclusive"), found.report()
    mixed = audit_window(
        net(Fn(cast), Fn(lambda x: x - x.mean(0)), dtype=dtype), CE, window(*SIZES, dtype=dtype)
    )
    assert mixed.verdict in ("biased", "inconclusive"), mixed.report()


# The numbers, computed here by deepcopy and a loop.


def test_e64_of_batch_norm_is_that_of_a_naive_loop() -> None:
    """To a millionth."""
    model, parts = net(nn.BatchNorm1d(HIDDEN)), window(*SIZES)
    n = sum(SIZES)
    one_pass = naive(model, [whole(parts)], [1 / n])
    expected = relative(naive(model, parts, [1 / n] * 3), one_pass)
    found = audit_window(model, CE, parts)
    assert found.e64 == pytest.approx(expected, rel=1e-6)
    assert found.e == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "global_mean", "sum"])
def test_e64_and_scale_of_each_reduction_are_those_of_a_naive_loop(reduction: str) -> None:
    """On 4, 4 and 3 samples; the scale is the component along the large batch's mean gradient."""
    model, parts, n = net(nn.LayerNorm(HIDDEN)), window(*SIZES), sum(SIZES)
    weights = {"mean": [1 / (3 * k) for k in SIZES], "global_mean": [1 / n] * 3, "sum": [1.0] * 3}
    mean_gradient = naive(model, [whole(parts)], [1 / n])
    accumulated = naive(model, parts, weights[reduction])
    dot = sum(float((accumulated[k] * g).sum()) for k, g in mean_gradient.items())
    scale = dot / sum(float(g.square().sum()) for g in mean_gradient.values())
    found = audit_window(model, CE, parts, reduction=reduction_named(reduction))
    assert found.scale == pytest.approx(scale, rel=1e-9)
    assert found.denominator == n
    if reduction == "mean":
        assert found.e64 == pytest.approx(relative(accumulated, mean_gradient), rel=1e-6)
        assert (found.verdict, found.cause) == ("biased", "unequal denominators")
        assert found.remedy is not None
        assert "4, 4, 3" in found.remedy
        assert "global_mean" in found.remedy
    else:
        assert found.e64 is not None
        assert found.e64 <= 1e-14
        assert found.verdict == "equivalent"
        assert found.scale == pytest.approx(n if reduction == "sum" else 1.0, rel=1e-12)


def test_the_divisor_of_the_sum_is_in_its_scale() -> None:
    """Divided by 8 where 11 samples count."""
    found = audit_window(net(), CE, window(*SIZES), reduction=Sum(8.0))
    assert found.scale == pytest.approx(11 / 8, rel=1e-12)


def test_e_is_that_of_a_naive_loop_in_the_models_own_precision() -> None:
    """The floor is of the same order: both are float32's rounding."""
    model, parts, n = net(), window(*SIZES), sum(SIZES)
    single = torch.float32
    expected = relative(
        naive(model, parts, [1 / n] * 3, single), naive(model, [whole(parts)], [1 / n], single)
    )
    found = audit_window(model, CE, parts)
    assert found.e is not None
    assert found.floor is not None
    assert 0 < found.e < 4 * max(expected, 1e-7)
    assert 1e-9 < found.floor < 1e-6


def test_parameters_are_listed_by_their_part_in_the_difference() -> None:
    """The worst first; shares are those of the whole difference."""
    found = audit_window(net(nn.BatchNorm1d(HIDDEN)), CE, window(*SIZES))
    shares = [row.share for row in found.parameters]
    assert shares == sorted(shares, reverse=True)
    assert found.e64 == pytest.approx(math.sqrt(sum(s * s for s in shares)), rel=1e-9)
    assert {row.name for row in found.parameters} == {
        n for n, _ in net(nn.BatchNorm1d(6)).named_parameters()
    }


def test_one_micro_batch_is_identical() -> None:
    """N = 1 is the reference, BatchNorm or not."""
    found = audit_window(net(nn.BatchNorm1d(HIDDEN)), CE, window(5))
    assert (found.verdict, found.accum_steps, found.e64, found.e) == ("identical", 1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "parts", "kind"),
    [
        (net(), window(4, 3), "equivalent"),
        (net(nn.BatchNorm1d(HIDDEN)), window(4, 3), "biased"),
        (net(nn.Dropout()), window(4, 3), "stochastic"),
        (net(Fn(lambda x: x * math.nan)), window(4, 3), "inconclusive"),
        (net(), window(4), "identical"),
    ],
)
def test_every_verdict_is_written_as_plain_values(model: nn.Module, parts: Any, kind: str) -> None:
    """`as_dict` goes through JSON and back; the report has a line for the verdict."""
    found: Audit = audit_window(model, CE, parts)
    assert found.verdict == kind
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert back["verdict"] == kind
    assert found.report().startswith(kind)


def test_a_state_that_every_pass_moves_is_found_with_its_module() -> None:
    """Spectral norm takes a step of its power iteration in each forward pass, N of them in a window."""
    model = net(nn.utils.parametrizations.spectral_norm(nn.Linear(HIDDEN, HIDDEN)))
    found = audit_window(model, CE, window(4, 4, 3))
    assert (found.verdict, found.cause) == ("biased", "state moves in the window")
    assert (found.culprit, found.culprit_type) == ("1.parametrizations.weight.0", "_SpectralNorm")
    assert "moves 3 times" in (found.remedy or "")


@pytest.mark.parametrize("free", [60_000, 200_000])
def test_a_window_without_room_is_audited_on_fewer_samples(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needed and what there was is said; the verdict is of the slice."""
    monkeypatch.setattr(available, "free_bytes", lambda device: free)
    found = audit_window(net(nn.BatchNorm1d(HIDDEN)), CE, window(400, 400, 300))
    assert (found.verdict, found.culprit_type) == ("biased", "BatchNorm1d")
    assert found.denominator is not None
    assert 4 <= found.denominator < 1100
    assert "slice" in (found.detail or "")
    assert "GiB" in (found.detail or "")


def test_a_window_for_which_there_is_no_room_at_all_is_inconclusive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It never takes the run down."""
    monkeypatch.setattr(available, "free_bytes", lambda device: 100)
    found = audit_window(net(), CE, window(4, 4))
    assert found.verdict == "inconclusive"
    assert "GiB" in (found.detail or "")
