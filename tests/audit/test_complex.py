"""Models with complex numbers are judged as others are: in float64's precision, both parts counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import plan_memory, watch
from gaccum_exp.audit.agreement import ROUNDING64
from gaccum_exp.audit.audit_window import audit_window
from tests.audit.support import large_batch, relative, taken, whole, wide

C64 = torch.complex64
Window = list[tuple[Tensor, Tensor]]


class Operator(nn.Module):
    """A layer of a Fourier neural operator: it makes a complex tensor itself and contracts by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4, dtype=C64))
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x.view(-1, 2, 8))
        out = torch.zeros(len(x), 3, 5, dtype=C64)
        out[:, :, :4] = torch.einsum("bix,iox->box", spectrum[:, :, :4], self.weight)
        return self.last(torch.fft.irfft(out, n=8)).mean(1)


class Layers(nn.Module):
    """Complex layers with a ReLU of both parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 5, dtype=C64), nn.Linear(5, 6, dtype=C64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(C64))
        return self.last(torch.complex(F.relu(hidden.real), F.relu(hidden.imag))).abs()


class StateSpace(nn.Module):
    """Complex states of real parameters, as S4 keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.poles, self.out = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        poles = torch.view_as_complex(self.poles)
        decay = torch.exp(torch.complex(-poles.real.exp(), poles.imag)[:, None] * torch.arange(16))
        kernel = torch.einsum("n,nl->l", torch.view_as_complex(self.out), decay).real
        spectrum = torch.fft.rfft(x, n=32) * torch.fft.rfft(kernel, n=32)
        return torch.fft.irfft(spectrum, n=32)[:, :6]


class Polar(nn.Module):
    """Rotations by parameters, and a filter of complex buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(16))
        self.register_buffer("filter", torch.randn(16, dtype=C64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.polar(torch.ones(16), self.phase) * self.filter).real[:, :6]


class Unitary(nn.Module):
    """A unitary matrix by a parametrization of torch's."""

    def __init__(self) -> None:
        super().__init__()
        linear = nn.Linear(16, 16, bias=False, dtype=C64)
        self.linear = nn.utils.parametrizations.orthogonal(linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.linear(x.to(C64))).flatten(1)[:, :6]


MODELS: list[Callable[[], nn.Module]] = [Operator, Layers, StateSpace, Polar, Unitary]
MSE = nn.MSELoss()


def made(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Window]:
    torch.manual_seed(0)
    return kind(), [(torch.randn(n, 16), torch.randn(n, 6)) for n in (3, 3, 3)]


@contextmanager
def in_double_precision() -> Iterator[None]:
    """Let the models above make their own tensors in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "C64", torch.complex128)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", MODELS)
def test_a_configured_window_is_equivalent(kind: Callable[[], nn.Module]) -> None:
    """To float64's rounding, so that no part of a pass was left in single precision."""
    found = audit_window(*(made(kind)[0], MSE, made(kind)[1]))
    assert found.verdict in ("equivalent", "identical"), found
    assert found.e64 is not None
    assert found.e64 < ROUNDING64


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_loop_is_judged(kind: Callable[[], nn.Module], divided: bool) -> None:
    """The sound loop is equivalent, and the one that does not divide by N is told so."""
    model, window = made(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = map(wide, whole(window))
    with in_double_precision():
        expected = large_batch(model, lambda m: MSE(m(x), y))
    found = taken(model, optimizer)
    with watch(model, MSE, optimizer) as audit:
        for inputs, target in window:
            (MSE(model(inputs), target) / (len(window) if divided else 1)).backward()
        optimizer.step()
    assert relative(found[0], expected) == pytest.approx(0 if divided else 2, abs=1e-5)
    if divided:
        assert audit.verdict in ("equivalent", "identical"), audit.report()
    else:
        assert (audit.verdict, audit.cause) == ("biased", "loss scale")
        assert audit.e64 == pytest.approx(2, abs=1e-9)


class Noise(Layers):
    """Complex noise for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(x.shape, dtype=C64))


class Centred(Layers):
    """A sample's output depends on the others'."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(C64)
        return super().forward(z - z.mean(0))


def test_complex_noise_is_held_and_complex_mixing_is_found() -> None:
    """Draws of complex numbers are recorded in both parts; a mean over the batch is no rounding."""
    noisy, window = made(Noise)
    assert audit_window(noisy, MSE, window).verdict == "stochastic"
    centred, window = made(Centred)
    found = audit_window(centred, MSE, window)
    assert (found.verdict, found.cause) == ("biased", "batch statistics")


class ComplexSquares(nn.Module):
    """A criterion of one's own for complex outputs and targets."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        squares = (output - target).abs() ** 2
        return squares.sum() if self.reduction == "sum" else squares.mean()


def test_complex_outputs_and_targets_have_a_criterion() -> None:
    """Its denominator is found, and the window equivalent."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=C64)
    window = [(torch.randn(n, 4, dtype=C64), torch.randn(n, 2, dtype=C64)) for n in (3, 1, 2)]
    found = audit_window(model, ComplexSquares(), window)
    assert (found.verdict, found.denominator) == ("equivalent", 12.0)


def test_memory_is_planned_for_complex_parameters() -> None:
    """Eight bytes an element, gradients alike."""
    model, window = made(Layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = tuple(torch.cat(parts) for parts in zip(*window, strict=True))
    plan = plan_memory(model, MSE, batch, optimizer)
    weights = 8 * sum(p.numel() for p in model.parameters())
    assert plan.rows[0].peak.bytes >= 2 * weights
