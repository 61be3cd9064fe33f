"""What an audit records of its window, against naive loops in float64; and the file that tells it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.audited_window import (
    WINDOW_FILE,
    AuditedWindow,
    LayerError,
    MicroBatchShare,
    joined,
    kept,
    read_window,
)
from gaccum_exp.core.cached import CACHED
from gaccum_exp.core.losses.protocol import LossFn
from gaccum_exp.core.reductions import Reduction, Sum, reduction_named
from gaccum_exp.core.strategies import IN_PLACE, InPlace
from tests.audit.support import CE, FEATURES, HIDDEN, Fn, Gradients, gradients, naive, net, window

SIZES = (5, 3, 1)
MEAN, GLOBAL_MEAN = reduction_named("mean"), reduction_named("global_mean")


def found_of(
    model: nn.Module,
    micro_batches: Sequence[Any],
    reduction: Reduction,
    loss: LossFn | nn.Module = CE,
    strategy: InPlace = IN_PLACE,
) -> AuditedWindow:
    """Audit; return what is known of the window."""
    audit = audit_window(model, loss, micro_batches, reduction=reduction, strategy=strategy)
    assert audit.window is not None, audit.report()
    return audit.window


def difference(one: Gradients, other: Gradients) -> Gradients:
    return {name: one[name] - other[name] for name in other}


def relative_by_layer(gradient: Gradients, reference: Gradients) -> list[float]:
    """Return each layer's norm over that of the reference, in the order of the model."""
    return [float(gradient[name].norm() / reference[name].norm()) for name in reference]


def assert_parts(found: AuditedWindow, parts: list[Gradients], one_pass: Gradients) -> None:
    """The error is the sum of these parts, and each micro-batch's is its part."""
    error = {name: sum((part[name] for part in parts), torch.zeros(())) for name in one_pass}
    assert [layer.name for layer in found.layers] == list(one_pass)
    assert [layer.error64 for layer in found.layers] == pytest.approx(
        relative_by_layer(error, one_pass), rel=1e-9
    )
    for index, part in enumerate(parts):
        shares = [layer.by_micro_batch[index] for layer in found.layers if layer.by_micro_batch]
        assert shares == pytest.approx(relative_by_layer(part, one_pass), rel=1e-9, abs=1e-14)


def test_of_the_mean_of_means_each_micro_batch_has_its_part_of_the_error() -> None:
    """(1/(N·nᵢ) − 1/n)∇Sᵢ in float64, of micro-batches that are not alike; their sum is the error."""
    model, micro_batches, n = net(dtype=torch.float64), window(*SIZES, dtype=torch.float64), sum(SIZES)
    found = found_of(model, micro_batches, MEAN)
    weights = [1 / (len(SIZES) * size) for size in SIZES]
    assert [m.weight for m in found.micro_batches] == pytest.approx(weights, rel=1e-15)
    assert [m.one_pass_weight for m in found.micro_batches] == pytest.approx([1 / n] * 3, rel=1e-15)
    assert [(m.index, m.first, m.samples, m.counted) for m in found.micro_batches] == [
        (0, 0, 5, 5.0), (1, 5, 3, 3.0), (2, 8, 1, 1.0),
    ]  # fmt: skip
    assert (found.unit, found.global_batch_size, found.no_shares) == ("samples", n, None)
    one_pass = naive(model, micro_batches, [1 / n] * 3)
    parts = [
        naive(model, [micro_batch], [weight - 1 / n])
        for micro_batch, weight in zip(micro_batches, weights, strict=True)
    ]
    assert_parts(found, parts, one_pass)


@pytest.mark.parametrize(("reduction", "weight"), [(GLOBAL_MEAN, 1 / 9), (Sum(), 1.0), (Sum(4.0), 0.25)])
def test_what_weighs_all_alike_has_no_part_in_an_error(reduction: Reduction, weight: float) -> None:
    """The window's count, or a constant, for every micro-batch and in one pass: each part is 0."""
    found = found_of(net(), window(*SIZES), reduction)
    for micro_batch in found.micro_batches:
        assert micro_batch.weight == micro_batch.one_pass_weight == pytest.approx(weight, rel=1e-15)
    for layer in found.layers:
        assert layer.by_micro_batch == (0.0, 0.0, 0.0)
        assert layer.floor is not None
        assert layer.floor > 0
        assert layer.error is not None
        assert layer.error < 1e-6


def test_tokens_are_counted_and_not_samples() -> None:
    """Labels that are ignored count nothing, and a micro-batch that has but such has no weight."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, 3, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100], [0, -100, -100], [1, 1, 2], [-100, -100, -100]])
    inputs = torch.randn(4, 3, FEATURES, dtype=torch.float64)

    def tokens(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        x, y = micro_batch
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        return loss, int((y != -100).sum())

    micro_batches = [(inputs[i : i + 1], labels[i : i + 1]) for i in range(4)]
    found = found_of(model, micro_batches, MEAN, tokens)
    assert [m.counted for m in found.micro_batches] == [2, 1, 3, 0]
    assert [m.weight for m in found.micro_batches] == [1 / 8, 1 / 4, 1 / 12, None]
    assert found.unit == "units"

    def of(index: int, weight: float) -> Gradients:
        model.zero_grad()
        (tokens(model, micro_batches[index])[0] * weight).backward()
        return gradients(model)

    shares = [of(index, 1 / 6) for index in range(4)]
    one_pass = {name: sum(s[name] for s in shares) for name in shares[0]}
    parts = [of(index, (w or 0) - 1 / 6) for index, w in enumerate([1 / 8, 1 / 4, 1 / 12, None])]
    assert_parts(found, parts, one_pass)


def two_terms(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return cross entropy by samples, and a penalty on those of the first class alone."""
    x, y = micro_batch
    out, first = model(x), y == 0
    penalty = (out.square() * first[:, None]).sum()
    ce = F.cross_entropy(out, y, reduction="sum")
    return {"ce": (ce, len(y)), "penalty": (penalty, int(first.sum()), 0.5)}


def test_each_term_has_its_own_weights() -> None:
    """A micro-batch's part is then of all terms together."""
    labels = (torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0]), torch.tensor([1, 0]))
    inputs = [x for x, _ in window(4, 3, 2, dtype=torch.float64)]
    model, micro_batches = net(dtype=torch.float64), list(zip(inputs, labels, strict=True))
    found, first = found_of(model, micro_batches, MEAN, two_terms), [2, 3, 1]
    parts, one_pass = [], []
    for at, ((x, y), n1) in enumerate(zip(micro_batches, first, strict=True)):
        for to, of_ce, of_penalty in (
            (parts, 1 / (3 * len(y)) - 1 / 9, 1 / (3 * n1) - 1 / sum(first)),
            (one_pass, 1 / 9, 1 / sum(first)),
        ):
            model.zero_grad()
            terms = two_terms(model, (x, y))
            (of_ce * terms["ce"][0] + 0.5 * of_penalty * terms["penalty"][0]).backward()
            to.append(gradients(model))
        ce, penalty = found.micro_batches[at].terms
        assert (ce.name, ce.counted, penalty.counted) == ("ce", len(y), n1)
        assert (ce.weight, penalty.weight) == pytest.approx((1 / (3 * len(y)), 1 / (3 * n1)))
        assert (ce.one_pass_weight, penalty.one_pass_weight) == pytest.approx((1 / 9, 1 / sum(first)))
        assert found.micro_batches[at].weight is None
    whole = {name: sum(each[name] for each in one_pass) for name in one_pass[0]}
    assert_parts(found, parts, whole)


def coupled(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    out = model(micro_batch[0])
    return (out @ out.T).logsumexp(1).sum(), len(out)


def unseen(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return a loss whose value is a sum over samples, and whose gradient is not."""
    loss = F.cross_entropy(model(micro_batch[0]), micro_batch[1], reduction="sum")
    return loss + (loss - loss.detach()) * len(micro_batch[0]), len(micro_batch[0])


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)])
@pytest.mark.parametrize(
    ("middle", "loss", "strategy", "said"),
    [
        (nn.BatchNorm1d(HIDDEN), CE, IN_PLACE, 'module "1" (BatchNorm1d) takes in the other samples'),
        (Fn(lambda x: x - x.mean(0)), CE, IN_PLACE, 'module "1" (Fn) takes in the other samples'),
        (nn.Identity(), coupled, IN_PLACE, "the large batch's loss is no sum"),
        (nn.Identity(), unseen, IN_PLACE, "do not add up"),
        (nn.Identity(), CE, CACHED, "taken once, over the outputs"),
    ],
)
def test_where_samples_are_coupled_no_micro_batch_has_a_share(
    middle: nn.Module, loss: Any, strategy: InPlace, said: str, sizes: tuple[int, ...]
) -> None:
    """Weights alike or not: the reason is said, with the module, and the layers' errors stay."""
    reduction = GLOBAL_MEAN if strategy is CACHED else MEAN
    found = found_of(net(middle), window(*sizes), reduction, loss, strategy)
    assert said in (found.no_shares or "")
    assert found.layers
    assert all(layer.by_micro_batch is None and layer.error is not None for layer in found.layers)


def test_what_is_drawn_is_replayed_for_the_parts_too() -> None:
    """Dropout takes no share away."""
    found = found_of(net(nn.Dropout()), window(*SIZES), MEAN)
    assert found.no_shares is None


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_a_layers_numbers_are_the_audits_where_there_is_one_layer(loss_scale: float) -> None:
    """Error and floor, in the run's precision and in float64; the norm without the loss scale."""
    model = nn.Linear(FEATURES, 3, bias=False)
    audit = audit_window(model, CE, window(*SIZES), reduction=MEAN, loss_scale=loss_scale)
    assert audit.window is not None
    (layer,) = audit.window.layers
    assert (layer.error, layer.floor, layer.error64) == (audit.e, audit.floor, audit.e64)
    assert layer.norm == audit.parameters[0].norm
    assert audit.window.no_shares is None


@pytest.mark.parametrize(("of_parts", "error"), [(0.0, 0.0), (1.0, None)])
def test_an_error_relative_to_a_gradient_of_zero_is_zero_or_unknown(
    of_parts: float, error: float | None
) -> None:
    """0 of 0 is 0; what should be zero and is not has no relative error."""
    model = net()
    model.register_parameter("own", nn.Parameter(torch.ones(2)))

    def touching(model: Any, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        x, y = micro_batch
        by = of_parts if len(x) < sum(SIZES) else 0.0
        return F.cross_entropy(model(x), y, reduction="sum") + by * model.own.sum(), len(x)

    layer = found_of(model, window(*SIZES), GLOBAL_MEAN, touching).layers[0]
    assert (layer.name, layer.norm, layer.error, layer.error64) == ("own", 0.0, error, error)


def test_one_micro_batch_is_the_large_batch() -> None:
    """It is drawn too, without errors."""
    found = found_of(net(), window(4), MEAN)
    assert found.micro_batches == (MicroBatchShare(0, 0, 4, 4.0, 0.25, 0.25),)
    assert (found.layers, found.accum_steps) == ((), 1)
    assert found.no_shares == "one micro-batch is the large batch itself"


def test_the_weights_and_the_audit_are_left_as_they_were() -> None:
    """The pass for the parts leaves no gradient, and draws nothing."""
    model = net(nn.Dropout())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found_of(model, window(*SIZES), MEAN)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_made_again_the_file_is_the_same_bytes_and_tells_the_same(tmp_path: Path) -> None:
    """JSON without NaN; what is read is what was written, to six digits."""
    texts = [found_of(net(), window(*SIZES), MEAN).as_json() for _ in range(2)]
    assert texts[0] == texts[1]
    (tmp_path / WINDOW_FILE).write_text(texts[0])
    read = read_window(tmp_path / WINDOW_FILE)
    assert read is not None
    assert read.as_json() == texts[0]
    assert read.micro_batches == found_of(net(), window(*SIZES), MEAN).micro_batches


def test_a_file_of_another_version_is_read_and_one_that_tells_nothing_is_none(tmp_path: Path) -> None:
    """Keys that are missing or unknown do not matter."""
    path = tmp_path / WINDOW_FILE
    assert read_window(path) is None
    for text in ("", "[]", "{}", '{"reduction": "mean"}', '{"layers": 3}'):
        path.write_text(text)
        assert read_window(path) is None
    least = {"reduction": "mean", "accum_steps": 2, "global_batch_size": 4, "later": {"a": 1}}
    layers = [{"name": "fc", "by_micro_batch": [0.5, None], "later": 1}]
    batches = [{"index": 0, "first": 0, "samples": 4}]
    path.write_text(json.dumps({**least, "layers": layers, "micro_batches": batches}))
    assert read_window(path) == AuditedWindow(
        "mean", 2, 4, layers=(LayerError("fc", by_micro_batch=(0.5, None)),),
        micro_batches=(MicroBatchShare(0, 0, 4),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "most", "layers"),
    [
        (["a.b.w", "a.b.v", "a.c.w", "d"], 4, ["a.b.w", "a.b.v", "a.c.w", "d"]),
        (["a.b.w", "a.b.v", "a.c.w", "d"], 3, ["a.b", "a.c", "d"]),
        (["a.b.w", "a.b.v", "a.c.w", "d"], 2, ["a", "d"]),
        (["a", "b", "c", "d", "e"], 2, ["a … c", "d … e"]),
    ],
)
def test_layers_are_joined_by_what_their_names_begin_with(
    names: list[str], most: int, layers: list[str]
) -> None:
    """As deep as leaves so many, in the order of the model; every parameter is in one."""
    found = joined(names, most)
    assert list(found) == layers
    assert [name for of in found.values() for name in of] == names


def test_of_very_many_micro_batches_the_first_and_the_last_are_kept() -> None:
    """Each by its index."""
    assert kept(128) == list(range(128))
    assert kept(1000) == [*range(64), *range(936, 1000)]


def test_joined_layers_have_one_error_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms over all their parameters."""
    model, micro_batches = net(dtype=torch.float64), window(*SIZES, dtype=torch.float64)
    single = found_of(model, micro_batches, MEAN)
    group: Callable[..., Any] = lambda names: joined(names, most=2)  # noqa: E731
    monkeypatch.setattr("gaccum_exp.audit.window_shares.joined", group)
    found = found_of(model, micro_batches, MEAN)
    assert [(layer.name, layer.parameters) for layer in found.layers] == [("0", 2), ("2", 2)]
    gap, own = 0.0, 0.0
    for layer in single.layers[:2]:
        assert layer.norm is not None
        assert layer.error64 is not None
        gap, own = gap + (layer.norm * layer.error64) ** 2, own + layer.norm**2
    assert found.layers[0].error64 == pytest.approx((gap / own) ** 0.5, rel=1e-12)
