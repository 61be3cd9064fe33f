"""What draws random numbers is stochastic or left open, never equivalent; held, it agrees."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from gaccum_exp.audit.agreement import ROUNDING64
from gaccum_exp.audit.audit_window import audit_window
from tests.audit.support import CE, FEATURES, HIDDEN, Fn, net, window

OPEN = ("stochastic", "inconclusive")


class Attention(nn.Module):
    """Scaled dot product attention with dropout, over the hidden units as tokens."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, None, :, None].expand(-1, 1, -1, 4)
        return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.5)[:, 0, :, 0]


class Encoder(nn.Module):
    """An encoder layer of torch's, batch first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.3, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), 3, 2)
        out = self.layer(tokens if self.batch_first else tokens.transpose(0, 1))
        return (out if self.batch_first else out.transpose(0, 1)).reshape(len(x), HIDDEN)


class Recurrent(nn.Module):
    """Two layers of LSTM with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.reshape(len(x), 3, 2))[0].flatten(1)[:, :HIDDEN]


class OwnGenerator(nn.Module):
    """Draws from a generator of torch's that is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Dropout())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


HELD: dict[str, Callable[[], nn.Module]] = {
    "dropout": nn.Dropout,
    "alpha dropout": nn.AlphaDropout,
    "rrelu": nn.RReLU,
    "stochastic depth": lambda: StochasticDepth(0.5, "row"),
    "attention dropout": Attention,
    "encoder layer": lambda: Encoder(True),
    "encoder layer, batch second": lambda: Encoder(False),
    "lstm": Recurrent,
    "gumbel": lambda: Fn(lambda x: F.gumbel_softmax(x)),
    "hard gumbel": lambda: Fn(lambda x: x + F.gumbel_softmax(x, hard=True)),
    "noise": lambda: Fn(lambda x: x + torch.randn_like(x)),
    "multiplied noise": lambda: Fn(lambda x: x * torch.rand(len(x), 1, dtype=x.dtype)),
    "own generator": OwnGenerator,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
}


@pytest.mark.parametrize("sizes", [(4, 4, 3), (2, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("name", HELD)
def test_noise_of_each_sample_is_held_and_found_stochastic(name: str, sizes: tuple[int, ...]) -> None:
    """With the same numbers for the same sample the gradients agree to float64 rounding."""
    found = audit_window(net(HELD[name]()), CE, window(*sizes))
    assert (found.verdict, found.cause) == ("stochastic", "randomness"), found.detail
    assert found.e64 is not None
    # Not 1e-12: LayerNorm on samples that dropout has nearly emptied magnifies rounding (seen: 1.7e-12).
    assert found.e64 <= ROUNDING64
    assert found.culprit is not None
    assert found.culprit.split(".")[0] == "1"


@pytest.mark.parametrize("name", HELD)
def test_batch_norm_beside_noise_is_biased_and_both_are_named(name: str) -> None:
    """The worse of the two is the verdict."""
    found = audit_window(net(nn.BatchNorm1d(HIDDEN), HELD[name]()), CE, window(4, 4, 3))
    assert (found.verdict, found.cause) == ("biased", "batch statistics"), found.detail
    assert (found.culprit, found.culprit_type) == ("1", "BatchNorm1d")
    assert any(c.cause == "randomness" and c.name.startswith("2") for c in found.culprits)


def mixup(x: Tensor) -> Tensor:
    return 0.7 * x + 0.3 * x[torch.randperm(len(x))]


def shared_noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(1, x.shape[1], dtype=x.dtype)


def numpy_noise(x: Tensor) -> Tensor:
    return x + torch.as_tensor(np.random.standard_normal(x.shape), dtype=x.dtype)


def python_gate(x: Tensor) -> Tensor:
    return x * (0.1 + random.random())


class Foreign(nn.Module):
    """Draws from a generator of Python's or NumPy's that is its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.1 + self.generator.random())


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class TimeMajor(nn.Module):
    """Dropout on rows that count time first and samples second."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 3, 2).transpose(0, 1).reshape(-1, 2)
        return self.dropout(rows).reshape(3, len(x), 2).transpose(0, 1).reshape(len(x), HIDDEN)


class Packed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), 3, 2)
        packed = pack_padded_sequence(tokens, torch.full((len(x),), 3), batch_first=True)
        return self.lstm(packed)[1][0].transpose(0, 1).flatten(1)


OPEN_ONES: dict[str, Callable[[], nn.Module]] = {
    "mixup": lambda: Fn(mixup),
    "noise shared by the batch": lambda: Fn(shared_noise),
    "batch stochastic depth": lambda: Residual(StochasticDepth(0.5, "batch")),
    "numpy": lambda: Fn(numpy_noise),
    "python": lambda: Fn(python_gate),
    "time before samples": TimeMajor,
    "packed sequence": Packed,
    "random.Random": lambda: Foreign(random.Random(0)),
    "numpy Generator": lambda: Foreign(np.random.default_rng(0)),
    "numpy RandomState": lambda: Foreign(np.random.RandomState(0)),
    "the system's": lambda: Foreign(random.SystemRandom()),
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (name, sizes)
        for name in OPEN_ONES
        for sizes in [(4, 4, 3), (2, 2), (1, 1, 1)]
        if (name, sizes) != ("mixup", (1, 1, 1))  # a permutation of one sample is none
    ],
)
def test_noise_that_cannot_be_held_is_named_and_never_equivalent(
    name: str, sizes: tuple[int, ...]
) -> None:
    """Whatever draws, and wherever from."""
    found = audit_window(net(OPEN_ONES[name]()), CE, window(*sizes))
    assert found.verdict in OPEN, (found.e64, found.cause, found.detail)
    assert found.cause == "randomness"


@pytest.mark.parametrize("name", OPEN_ONES)
def test_batch_norm_beside_such_noise_is_not_excused_by_it(name: str) -> None:
    """Stochastic says that it is equivalent with the numbers held, and it is not."""
    for middle in (
        [nn.BatchNorm1d(HIDDEN), OPEN_ONES[name]()],
        [OPEN_ONES[name](), nn.BatchNorm1d(HIDDEN)],
    ):
        found = audit_window(net(*middle), CE, window(4, 4, 3))
        assert found.verdict in ("biased", "inconclusive"), (found.e64, found.cause, found.detail)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_that_draws_nothing_or_everything_is_no_randomness(p: float) -> None:
    """Its gradient does not depend on any number drawn."""
    found = audit_window(net(nn.Dropout(p)), CE, window(4, 4, 3))
    assert found.verdict in ("equivalent", "identical")


def test_the_models_own_inputs_have_the_width_that_is_reshaped_here() -> None:
    """The modules above cut hidden units into three tokens of two."""
    assert (FEATURES, HIDDEN) == (5, 6)
