"""Several criteria as one loss function, against their losses over the whole batch."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.terms import CriterionTerm, TermsLoss
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError


class Named(NamedTuple):
    out: Tensor
    aux: Tensor


class Net(nn.Module):
    """Puts out two tensors, as this kind of container."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out, self.aux, self.kind = nn.Linear(4, 3), nn.Linear(4, 2), kind
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.out(x), self.aux(x))


class Focal(nn.Module):
    """A criterion that torch does not have, whose denominator is found out by a probe."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = (outputs - targets).abs() ** 3
        return loss.mean() if self.reduction == "mean" else loss.sum()


class Positives(Focal):
    """A focal loss over max(1, positives), which is no sum over micro-batches."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = (torch.sigmoid(outputs) - targets).abs() ** 3
        return loss.sum() / (targets.sum().clamp(min=1) if self.reduction == "mean" else 1)


def batch(samples: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (samples,), generator=generator)
    y[:3] = 255
    return x, y, torch.randn(samples, 2, generator=generator, dtype=torch.float64)


def terms(output: Any, target: Any, of_aux: nn.Module) -> TermsLoss:
    classes = nn.CrossEntropyLoss(ignore_index=255, weight=torch.tensor([1.0, 2, 3]).double())
    return TermsLoss({
        "seg": CriterionTerm(classes, output[0], target[0]),
        "aux": CriterionTerm(of_aux, output[1], target[1], 0.4),
    })  # fmt: skip


def pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b


def by_name(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {"out": a, "aux": b}


SHAPES = [
    (pair, (0, 1), (0, 1), lambda x, y, z: (x, y, z)),
    (pair, (0, -1), (0, 1), lambda x, y, z: (x, (y, z))),
    (by_name, ("out", "aux"), ("mask", "z"), lambda x, y, z: (x, {"mask": y, "z": z})),
    (Named, ("out", "aux"), ("mask", "z"), lambda x, y, z: {"x": x, "mask": y, "z": z}),
]


@pytest.mark.parametrize("of_aux", [nn.MSELoss(), Focal()], ids=["counted", "late"])
@pytest.mark.parametrize(("kind", "output", "target", "made"), SHAPES)
def test_each_criterion_is_divided_by_its_own_denominator(
    kind: Any, output: Any, target: Any, made: Any, of_aux: nn.Module
) -> None:
    """By index and by key; class weights, ignored labels, elements, and a count that is found out."""
    x, y, z = batch()
    whole = Net(kind)
    weight = torch.tensor([1.0, 2, 3]).double()
    of_seg = nn.functional.cross_entropy(whole.out(x), y, weight=weight, ignore_index=255)
    expected = of_seg + 0.4 * of_aux(whole.aux(x), z)
    expected.backward()
    for steps in (1, 2, 3, 5):
        window = [
            made(*part)
            for part in zip(*(t.split(split_sizes(7, steps)) for t in (x, y, z)), strict=True)
        ]
        model = Net(kind)
        loss = accumulate_gradients(model, terms(output, target, of_aux), window)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]
        assert loss.mean == pytest.approx(expected.item(), rel=1e-13)
        assert loss.terms["seg"].mean == pytest.approx(of_seg.item(), rel=1e-13)


@pytest.mark.parametrize("rows", [[], [6], [2, 3, 6]])
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 2, 4], [1] * 7])
def test_a_clamp_of_one_criterion_is_of_its_terms_window(rows: list[int], sizes: list[int]) -> None:
    """Beside another term; with no positive in the window, with one, and with several late ones."""
    x, y, _ = batch()
    positive = torch.zeros(7, 2, dtype=torch.float64)
    positive[rows] = 1
    whole, model = Net(pair), Net(pair)
    (
        nn.CrossEntropyLoss(ignore_index=255)(whole.out(x), y) + Positives()(whole.aux(x), positive)
    ).backward()
    loss_fn = TermsLoss({
        "seg": CriterionTerm(nn.CrossEntropyLoss(ignore_index=255), 0, 0),
        "focal": CriterionTerm(Positives(), 1, 1),
    })  # fmt: skip
    window = list(zip(*(t.split(sizes) for t in (x, y, positive)), strict=True))
    loss = accumulate_gradients(model, loss_fn, window)
    assert loss.terms["focal"].denominator == max(1, 2 * len(rows))
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "output", "target", "made"), SHAPES)
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 2, 4]])
def test_over_the_whole_window_each_criterion_has_its_own_mean(
    kind: Any, output: Any, target: Any, made: Any, sizes: list[int]
) -> None:
    """Under strategy=cached: CTC's or any other, with targets at every kind of place."""

    def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cdist(outputs.exp(), targets).square().mean().sqrt()

    class Coupled(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return coupled(outputs, targets)

    x, y, z = batch()
    whole, model = Net(kind), Net(kind)
    classes = nn.CrossEntropyLoss(ignore_index=255)
    expected = classes(whole.out(x), y) + 0.4 * coupled(whole.aux(x), z)
    expected.backward()
    loss_fn = TermsLoss(
        {
            "seg": CriterionTerm(classes, output[0], target[0]),
            "aux": CriterionTerm(Coupled(), output[1], target[1], 0.4),
        },
        whole_window=True,
    )
    window = [made(*part) for part in zip(*(t.split(sizes) for t in (x, y, z)), strict=True)]
    loss = accumulate_gradients(model, loss_fn, window, strategy="cached")
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]
    assert loss.mean == pytest.approx(expected.item(), rel=1e-12)


def test_without_places_a_criterion_gets_all_outputs_and_targets() -> None:
    """And with a list of places those, in its own order of arguments."""
    x, _, z = batch()
    for output, target in ((None, None), ([0, 1], [0])):
        model, whole = Net(lambda a, b: (a[:, :2], b.exp())), Net(pair)
        loss_fn = TermsLoss({"nll": CriterionTerm(nn.GaussianNLLLoss(), output, target)})
        accumulate_gradients(model, loss_fn, [(x[:3], z[:3]), (x[3:], z[3:])])
        nn.GaussianNLLLoss()(whole.out(x)[:, :2], z, whole.aux(x).exp()).backward()
        assert torch.allclose(model.aux.weight.grad, whole.aux.weight.grad)  # type: ignore[arg-type]


def test_the_parameters_of_every_criterion_are_the_losss() -> None:
    """As `criterion`, by the name of its term."""
    loss_fn = terms((0, 1), (0, 1), nn.MSELoss())
    assert [name for name, _ in loss_fn.criterion.named_buffers()] == ["seg.weight"]


@pytest.mark.parametrize(
    ("output", "target", "said"),
    [
        ("outt", 0, "term 'seg': there is no output 'outt', only out, aux, did you mean 'out'"),
        (3, 0, "term 'seg': there is no output 3, the outputs are 2"),
        ("out", 2, "term 'seg': there is no target 2, the targets are 2"),
        ("out", "mask", "term 'seg': there is no target 'mask', none with a name"),
    ],
)
def test_a_place_that_is_not_there_is_named(output: Any, target: Any, said: str) -> None:
    """With those that are."""
    loss_fn = TermsLoss({"seg": CriterionTerm(nn.CrossEntropyLoss(), output, target)})
    with pytest.raises(BadInputError, match=said):
        accumulate_gradients(Net(by_name), loss_fn, [batch()])


def test_a_criterion_without_a_denominator_is_refused_as_it_is_alone() -> None:
    """CTC's mean is no ratio; under `mean` it is the criterion's own."""
    with pytest.raises(BadInputError, match="global_mean is refused for criterion CTCLoss"):
        TermsLoss({"ctc": CriterionTerm(nn.CTCLoss())})
    TermsLoss({"ctc": CriterionTerm(nn.CTCLoss())}, "mean")
