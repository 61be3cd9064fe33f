"""AdamA and batch-size-invariant Adam in float64, against loops that hold every micro gradient."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.core.batch_size_invariant_adam import BatchSizeInvariantAdam
from gaccum_exp.core.losses.criterion import as_loss_fn
from gaccum_exp.core.reductions import reduction_named
from gaccum_exp.core.strategies import AccumulatorState
from gaccum_exp.errors import BadInputError

BETAS, RATE, EPS, DECAY = (0.8, 0.95), 0.01, 1e-3, 0.1
SPLITS = ([3, 1, 4], [2], [5, 2, 2, 1])
"""Micro-batches of the windows of a training, of unequal sizes and numbers."""


class Branching(nn.Module):
    """A shared layer, one that not every micro-batch uses, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.never = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = self.first(self.first(x).tanh())
        return self.sometimes(x) if branch else x


def model() -> Branching:
    torch.manual_seed(0)
    return Branching().double()


def windows() -> list[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [
            {
                "x": torch.randn(size, 5, generator=generator, dtype=torch.float64),
                "branch": number != 1 and i % 2 == 0,
                "labels": torch.randint(5, (size,), generator=generator),
            }
            for i, size in enumerate(sizes)
        ]
        for number, sizes in enumerate(SPLITS)
    ]


def adamw(of: nn.Module, **more: Any) -> torch.optim.AdamW:
    how = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY} | more
    return torch.optim.AdamW(of.parameters(), **how)


def train(of: nn.Module, strategy: AdamA, reduction: Any = "global_mean") -> torch.optim.Optimizer:
    optimizer = adamw(of)
    bound = strategy.for_optimizer(optimizer)
    for window in windows():
        accumulate_gradients(of, nn.CrossEntropyLoss(), window, reduction=reduction, strategy=bound)
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in of.parameters())
        bound.step_of(optimizer)()
    return optimizer


def shares(of: nn.Module, window: list[Any], reduction: str) -> list[tuple[float, dict[str, Tensor]]]:
    """Return of each micro-batch its share wᵢ, and the gradient of wᵢ times its mean loss."""
    n, found = sum(len(part["labels"]) for part in window), []
    for part in window:
        size = len(part["labels"])
        share = {"global_mean": size / n, "mean": 1 / len(window), "sum": float(size)}[reduction]
        alone = copy.deepcopy(of)
        (share * F.cross_entropy(alone(part["x"], part["branch"]), part["labels"])).backward()
        named = alone.named_parameters()
        found.append((share, {name: p.grad for name, p in named if p.grad is not None}))
    return found


def by_hand(of: nn.Module, reduction: str, base_steps: int | None) -> None:
    """Train as AdamA does, or as batch-size-invariant Adam, with every micro gradient at hand."""
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    so_far: dict[str, float] = {}
    for window in windows():
        parts, kappa = shares(of, window, reduction), len(window) / base_steps if base_steps else 1.0
        one, two = (beta**kappa for beta in BETAS)
        for name, p in of.named_parameters():
            mine = [(share, g[name]) for share, g in parts if name in g]
            if not mine:
                continue
            total = sum(g for _, g in mine)
            square = sum((g / share) ** 2 * share if base_steps else g**2 for share, g in mine)
            means[name] = one * means.get(name, 0.0) + (1 - one) * total
            squares[name] = two * squares.get(name, 0.0) + (1 - two) * square
            so_far[name] = so_far.get(name, 0.0) + kappa
            first, second = (1 - beta ** so_far[name] for beta in BETAS)
            root = (squares[name] / second).sqrt() + EPS
            with torch.no_grad():
                p.mul_(1 - kappa * RATE * DECAY).sub_(kappa * RATE * means[name] / first / root)


@pytest.mark.parametrize(
    ("base_steps", "reduction"),
    [(None, "global_mean"), (None, "mean"), (None, "sum")]
    + [(base, how) for base in (1, 2) for how in ("global_mean", "mean")],
)
def test_a_training_is_that_of_a_loop_that_holds_every_micro_gradient(
    base_steps: int | None, reduction: Any
) -> None:
    """Over windows of three, one and four unequal micro-batches; some parameters get no gradient."""
    ours, theirs = model(), model()
    train(ours, BatchSizeInvariantAdam(base_steps) if base_steps else AdamA(), reduction)
    by_hand(theirs, reduction, base_steps)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("strategy", [AdamA(), BatchSizeInvariantAdam()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_with_one_micro_batch_it_is_adam_bit_for_bit(strategy: AdamA, dtype: torch.dtype) -> None:
    """And its state is torch's: plain Adam goes on from it."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(7, 3, dtype=dtype)) for _ in range(2)]
    batches = torch.randn(4, 5, 7).to(dtype)
    ends = []
    for ours in (True, False):
        of = nn.ParameterList(copy.deepcopy(weights))
        optimizer = adamw(of, foreach=False)
        bound = strategy.for_optimizer(optimizer)

        def loss_fn(_: nn.Module, x: Tensor, of: Any = of) -> tuple[Tensor, int]:
            return (x @ of[0] + of[1].sum()).abs().square().sum(), len(x)

        loss_fn.count = len  # type: ignore[attr-defined]
        for number, x in enumerate(batches):
            how = {"strategy": bound} if ours and number < 3 else {}
            accumulate_gradients(of, loss_fn, [x], **how)
            (bound.step_of(optimizer) if how else optimizer.step)()
            optimizer.zero_grad()
        state = [value for p in of for value in optimizer.state[p].values()]
        ends.append([*of, *state])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def linear(optimizer_steps: int, accum_steps: int, strategy: AdamA) -> tuple[Tensor, Tensor]:
    """Train with the same gradient in every micro-batch; return the way that was gone, and v̂."""
    of = nn.Linear(3, 1, bias=False).double()
    start = of.weight.detach().clone()
    optimizer = adamw(of, weight_decay=0.0, eps=0.0)
    bound = strategy.for_optimizer(optimizer)

    def loss_fn(m: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return m(x).sum(), len(x)

    loss_fn.count = len  # type: ignore[attr-defined]
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    for _ in range(optimizer_steps):
        accumulate_gradients(of, loss_fn, [x] * accum_steps, strategy=bound)
        bound.step_of(optimizer)()
    return of.weight.detach() - start, optimizer.state[of.weight]["exp_avg_sq"]


def test_without_noise_adam_a_goes_root_n_times_as_far() -> None:
    """Since the sum of N equal squares is 1/N of the square of their sum."""
    one, _ = linear(3, 1, AdamA())
    for n in (4, 9):
        far, _ = linear(3, n, AdamA())
        assert torch.allclose(far, math.sqrt(n) * one, rtol=1e-12)


def test_without_noise_batch_size_invariant_adam_is_invariant() -> None:
    """Of 24 micro-batches any N makes the same way and the same moments."""
    way, square = linear(24, 1, BatchSizeInvariantAdam())
    for n in (2, 8, 24):
        other, other_square = linear(24 // n, n, BatchSizeInvariantAdam())
        assert torch.allclose(other, way, rtol=1e-12)
        assert torch.allclose(other_square, square, rtol=1e-12)
    half, _ = linear(24, 1, BatchSizeInvariantAdam(2))
    assert torch.allclose(half, way / 2, rtol=1e-12)


def test_a_window_that_is_interrupted_goes_on_bit_for_bit() -> None:
    """After any micro-batch: what it holds is the optimizer's state, and a mark for each parameter."""
    window = windows()[2]
    reduction, loss_fn = reduction_named("global_mean"), as_loss_fn(nn.CrossEntropyLoss(), "global_mean")
    from gaccum_exp.core.accumulate import accumulate

    for strategy in (AdamA(), BatchSizeInvariantAdam(2)):
        whole = model()
        optimizer = adamw(whole)
        bound = strategy.for_optimizer(optimizer)
        kept: list[Any] = []

        def keep(state: AccumulatorState, of: Any = whole, by: Any = optimizer, to: Any = kept) -> None:
            names = {p: name for name, p in of.named_parameters()}
            to.append((state.state_dict(names), copy.deepcopy(by.state_dict())))

        accumulate(whole, loss_fn, window, reduction, bound, after=keep)
        bound.step_of(optimizer)()
        for held, of_optimizer in kept:
            again = model()
            other = adamw(again)
            other.load_state_dict(of_optimizer)
            begun = AccumulatorState.from_state_dict(held, dict(again.named_parameters()))
            going_on = strategy.for_optimizer(other)
            accumulate(again, loss_fn, window, reduction, going_on, begun=begun)
            going_on.step_of(other)()
            pairs = zip(again.parameters(), whole.parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("strategy", [AdamA(), BatchSizeInvariantAdam()])
def test_what_does_not_count_moves_no_moment(
    strategy: AdamA, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window, where counts are numbers and where they are tensors; and a micro-batch adds none."""

    def loss_fn(m: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        return (m(part[0]).squeeze(-1) * part[1]).sum(), loss_fn.count(part)  # type: ignore[attr-defined]

    loss_fn.count = lambda part: part[1].sum() if on_device else float(part[1].sum())  # type: ignore[attr-defined]
    if on_device:  # of a tensor on the host it is a number
        monkeypatch.setattr("gaccum_exp.core.accumulate.count", lambda _, part: loss_fn.count(part))  # type: ignore[attr-defined]
    of = nn.Linear(3, 1).double()
    optimizer = adamw(of)
    bound = strategy.for_optimizer(optimizer)
    x = torch.randn(2, 3, dtype=torch.float64)
    none, some = torch.zeros(2).double(), torch.ones(2).double()
    assert accumulate_gradients(of, loss_fn, [(x, none)] * 2, strategy=bound).denominator == 0
    before = of.weight.detach().clone()
    bound.step_of(optimizer)()
    assert not optimizer.state
    assert torch.equal(of.weight, before)
    moments = []
    for window in ([(x, none), (x, some)], [(x, some), (x, none)]):
        optimizer.state.clear()
        accumulate_gradients(of, loss_fn, window, strategy=bound)
        moments.append(
            [optimizer.state[p][k] for p in of.parameters() for k in ("exp_avg", "exp_avg_sq")]
        )
    for one, other in zip(*moments, strict=True):
        assert torch.isfinite(one).all()
        assert torch.allclose(one, other, rtol=1e-12)


def _late(m: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return m(x).sum(), len(x)


def _terms(m: nn.Module, x: Tensor) -> dict[str, Any]:
    return {"all": (m(x).sum(), len(x))}


_terms.count = lambda x: {"all": len(x)}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.SGD, "needs torch.optim.Adam or AdamW.*is SGD: use optimizer=adamw"),
        (torch.optim.NAdam, "is NAdam"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), r"weight_decay=0.1: .*optimizer=adamw"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "optimizer.amsgrad=true"),
        (lambda p: torch.optim.AdamW(p, fused=True), "optimizer.fused=true"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "optimizer.maximize=true"),
    ],
)
def test_an_optimizer_that_it_does_not_know_is_refused(optimizer: Any, said: str) -> None:
    """By name, with the way out."""
    with pytest.raises(BadInputError, match=said):
        AdamA().for_optimizer(optimizer(nn.Linear(2, 2).parameters()))


def test_what_cannot_be_right_is_refused_before_anything_moves() -> None:
    """Losses counted late, gradients of earlier, no optimizer, another buffer, sums and terms."""
    of = nn.Linear(2, 1)
    optimizer = adamw(of)
    strategy, invariant = (kind.for_optimizer(optimizer) for kind in (AdamA(), BatchSizeInvariantAdam()))
    window = [torch.ones(2, 2)] * 2
    with pytest.raises(
        BadInputError, match=r"counted only after its forward pass.*count\(micro_batch\)"
    ):
        accumulate_gradients(of, _late, window, strategy=strategy)
    with pytest.raises(BadInputError, match=r"AdamA\(\).for_optimizer\(optimizer\)"):
        accumulate_gradients(of, _terms, window, strategy=AdamA())
    with pytest.raises(BadInputError, match=r"accum\.buffer_dtype=float32 has no meaning"):
        strategy.buffered(torch.float32)
    with pytest.raises(BadInputError, match=r"accum\.reduction=sum has no meaning.*global_mean"):
        accumulate_gradients(of, _terms, window, reduction="sum", strategy=invariant)
    with pytest.raises(BadInputError, match="has several terms"):
        accumulate_gradients(of, _terms, window, strategy=invariant)
    for base in (0, 1.5, True):
        with pytest.raises(BadInputError, match=f"strategy.base_steps={base}: must be an integer"):
            BatchSizeInvariantAdam(base)  # type: ignore[arg-type]
    of.weight.grad = torch.ones_like(of.weight)
    with pytest.raises(BadInputError, match=r"holds gradients already.*zero_grad"):
        accumulate_gradients(of, _terms, window, strategy=strategy)
    of.weight.grad = None
    accumulate_gradients(
        of, _terms, window, strategy=strategy
    )  # of terms counted beforehand it is right
    assert optimizer.state[of.weight]["step"] == 1


def test_gradients_that_are_sparse_or_come_in_parts_are_refused() -> None:
    """Each part would be squared by itself."""
    of = nn.Embedding(4, 2, sparse=True)
    strategy = AdamA().for_optimizer(adamw(of))
    rows = torch.tensor([0, 1])
    with pytest.raises(BadInputError, match=r"is sparse: use sparse=False"):
        accumulate_gradients(of, _terms, [rows], strategy=strategy)
    net = nn.Linear(2, 1)
    strategy = AdamA().for_optimizer(adamw(net))

    def twice(loss: Tensor) -> None:
        torch.autograd.backward(loss, retain_graph=True)
        torch.autograd.backward(loss)

    with pytest.raises(BadInputError, match="in several parts within one micro-batch"):
        accumulate_gradients(net, _terms, [torch.ones(2, 2)], strategy=strategy, backward=twice)
