"""Windows of a loss with several terms, against the large batch written out with autograd."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.accumulate import accumulate
from gaccum_exp.core.losses.protocol import at_least
from gaccum_exp.core.reductions import Sum, reduction_named
from gaccum_exp.core.strategies import IN_PLACE, AccumulatorState, Buffered
from gaccum_exp.core.window import split_sizes
from gaccum_exp.core.window_loss import WindowLoss
from gaccum_exp.errors import BadInputError

TIGHT = 1e-13
STEPS = (1, 2, 3, 5)
SAMPLES = 11
"""Which none of them divides but one."""


class Net(nn.Module):
    """A model with dropout, batch-independent, and a learned weight of a term."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.drop = nn.Linear(5, 8), nn.Linear(8, 3), nn.Dropout(p)
        self.log_variance = nn.Parameter(torch.tensor(0.3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.first(x).tanh()))
        return out


Batch = tuple[Tensor, Tensor, Tensor]


def batch(samples: int = SAMPLES, seed: int = 1) -> Batch:
    """Inputs, labels of which some are ignored, and which samples hold a box: the first five none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (samples,), generator=generator)
    labels[torch.rand(samples, generator=generator) < 0.3] = -100
    boxed = torch.rand(samples, generator=generator) < 0.6
    boxed[:5] = False
    return x, labels, boxed


def split(data: Batch, steps: int) -> list[Any]:
    sizes = split_sizes(len(data[0]), steps)
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def detection(model: nn.Module, micro_batch: Any) -> dict[str, Any]:
    """Classes over labels, boxes over boxes; a micro-batch without boxes has no such term."""
    x, labels, boxed = micro_batch
    out = model(x)
    terms: dict[str, Any] = {
        "class": (F.cross_entropy(out, labels, reduction="sum"), (labels != -100).sum()),
        "size": (out.square().sum(), len(x), 0.1),
    }
    if boxed.any():
        terms["box"] = (out[boxed].abs().sum(), boxed.sum(), 0.5)
    return terms


class Counting:
    """The same with its counts known beforehand; of some names, or all."""

    def __init__(self, names: tuple[str, ...] = ("class", "size", "box")) -> None:
        self.names = names

    def __call__(self, model: nn.Module, micro_batch: Any) -> dict[str, Any]:
        return detection(model, micro_batch)

    def count(self, micro_batch: Any) -> dict[str, Any]:
        x, labels, boxed = micro_batch
        every = {"class": (labels != -100).sum(), "size": len(x), "box": boxed.sum()}
        return {name: every[name] for name in self.names}


def of_means(means: Tensor) -> Tensor:
    return means.prod(0).sum()


def balance(model: nn.Module, micro_batch: Any) -> dict[str, Any]:
    """Cross entropy, and a product of two means over the batch, as mixtures of experts balance."""
    x, labels, _ = micro_batch
    out = model(x)
    p = out.softmax(1)
    chosen = F.one_hot(p.argmax(1), 3).double()
    return {
        "class": (F.cross_entropy(out, labels, reduction="sum"), (labels != -100).sum()),
        "balance": (torch.stack([p.sum(0), chosen.sum(0)]), len(x), 0.7, of_means),
    }


def gradient(model: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def large(loss: Callable[[nn.Module], Tensor], model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a function of the whole batch, by plain autograd."""
    model = model or Net()
    value = loss(model)
    value.backward()
    return value.detach(), gradient(model)


def detection_of(data: Batch) -> Callable[[nn.Module], Tensor]:
    x, labels, boxed = data

    def loss(model: nn.Module) -> Tensor:
        out = model(x)
        total = F.cross_entropy(out, labels) + 0.1 * out.square().sum() / len(x)
        return total + 0.5 * out[boxed].abs().sum() / boxed.sum()

    return loss


def balance_of(data: Batch) -> Callable[[nn.Module], Tensor]:
    x, labels, _ = data

    def loss(model: nn.Module) -> Tensor:
        out = model(x)
        p = out.softmax(1)
        chosen = F.one_hot(p.argmax(1), 3).double()
        return F.cross_entropy(out, labels) + 0.7 * (p.mean(0) * chosen.mean(0)).sum()

    return loss


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "loss_fn", [detection, Counting(), Counting(("class",))], ids=["late", "counted", "one counted"]
)
def test_every_term_is_divided_by_its_own_count_of_the_window(steps: int, loss_fn: Any) -> None:
    """The large batch's gradient, loss and terms, though the first micro-batches hold no box."""
    data, model = batch(), Net()
    expected, exact = large(detection_of(data))
    loss = accumulate_gradients(model, loss_fn, split(data, steps))
    assert relative(gradient(model), exact) < TIGHT
    assert loss.mean == pytest.approx(float(expected), rel=1e-14)
    assert {name: float(term.denominator) for name, term in loss.terms.items()} == {
        "class": int((data[1] != -100).sum()), "size": SAMPLES, "box": int(data[2].sum())
    }  # fmt: skip
    means = {name: float(term.mean) for name, term in loss.terms.items()}
    assert means["class"] + 0.1 * means["size"] + 0.5 * means["box"] == pytest.approx(float(expected))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("counted", [False, True])
def test_a_function_of_the_windows_sums_is_the_large_batchs(steps: int, counted: bool) -> None:
    """A balance term: as a sum it would be biased, in two passes it is exact."""

    def loss_fn(model: nn.Module, part: Any) -> dict[str, Any]:
        return balance(model, part)

    if counted:
        loss_fn.count = lambda part: {"class": (part[1] != -100).sum(), "balance": len(part[0])}  # type: ignore[attr-defined]
    data, model = batch(), Net()
    expected, exact = large(balance_of(data))
    loss = accumulate_gradients(model, loss_fn, split(data, steps))
    assert relative(gradient(model), exact) < TIGHT
    assert loss.mean == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("steps", STEPS)
def test_sums_without_a_denominator_stay_sums(steps: int) -> None:
    """Dice over the batch with a constant in it, which means would change."""
    x, _, boxed = batch()

    def dice(sums: Tensor) -> Tensor:
        return 1 - (2 * sums[0] + 1) / (sums[1] + sums[2] + 1)

    def sums_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        p = model(x)[:, 0].sigmoid()
        return torch.stack([(p * target).sum(), p.sum(), target.double().sum()])

    model = Net()
    accumulate_gradients(
        model,
        lambda m, part: {"dice": (sums_of(m, part[0], part[2]), None, 1.0, dice)},
        split(batch(), steps),
    )
    _, exact = large(lambda m: dice(sums_of(m, x, boxed)))
    assert relative(gradient(model), exact) < TIGHT


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 40),
    st.sampled_from([detection, balance, Counting(), Counting(("box",))]),
)
def test_any_split_gives_what_one_pass_gives(sizes: list[int], seed: int, loss_fn: Any) -> None:
    """Sizes that do not divide, micro-batches and whole windows in which a term counts nothing."""
    data = batch(sum(sizes) + 5, seed)
    window = list(zip(*(t.split([5, *sizes]) for t in data), strict=True))
    found = []
    for parts in (window, [data]):
        model = Net()
        loss = accumulate_gradients(model, loss_fn, parts)
        found.append((gradient(model), float(loss.mean), loss.terms.keys()))
    (many, loss_of_many, terms), (one, loss_of_one, terms_of_one) = found
    assert relative(many, one) < TIGHT
    assert loss_of_many == pytest.approx(loss_of_one, rel=1e-13)
    assert terms == terms_of_one


@pytest.mark.parametrize("steps", STEPS)
def test_mean_and_sum_mean_the_same_for_terms(steps: int) -> None:
    """mean: Σ_t w_t (1/N) Σ S_ti/n_ti, with nothing where nothing counts; sum: Σ_t w_t Σ S_ti / d."""
    window = split(batch(), steps)
    for loss_fn in (detection, Counting()):
        for reduction, divisor in (("mean", lambda n: len(window) * n), ("sum", lambda n: 4.0)):
            by_hand = Net()
            for part in window:
                terms = [[*term, 1.0][:3] for term in detection(by_hand, part).values()]
                sum(w * total / divisor(n) for total, n, w in terms if n).backward()  # type: ignore[union-attr]
            model = Net()
            how = {"sum_divisor": 4.0} if reduction == "sum" else {}
            accumulate_gradients(model, loss_fn, window, reduction=reduction, **how)  # type: ignore[arg-type]
            assert relative(gradient(model), gradient(by_hand)) < TIGHT


def test_the_loss_of_a_window_does_not_depend_on_the_reduction() -> None:
    """The weighted total of the window's own means, functions of sums included."""
    expected, _ = large(detection_of(batch()))
    for reduction in ("mean", "sum"):
        loss = accumulate_gradients(Net(), detection, split(batch(), 3), reduction=reduction)  # type: ignore[arg-type]
        assert loss.mean == pytest.approx(float(expected), rel=1e-14)
    expected, _ = large(balance_of(batch()))
    loss = accumulate_gradients(Net(), balance, split(batch(), 3), reduction="mean")
    assert loss.mean == pytest.approx(float(expected), rel=1e-14)


def test_under_mean_a_function_is_taken_of_each_micro_batch_and_sum_refuses_it() -> None:
    """What people do, averaged over N; a sum has no means to take a function of."""
    window, by_hand, model = split(batch(), 3), Net(), Net()
    for part in window:
        (balance_of(part)(by_hand) / 3).backward()
    accumulate_gradients(model, balance, window, reduction="mean")
    assert relative(gradient(model), gradient(by_hand)) < TIGHT
    with pytest.raises(BadInputError, match=r"reduction=sum is refused for term 'balance'.*global_mean"):
        accumulate_gradients(Net(), balance, window, reduction="sum")


def test_sum_takes_a_constant_of_each_term() -> None:
    """d_t; and a term without one is refused by name."""
    window, model, by_hand = split(batch(), 3), Net(), Net()
    constants = {"class": 3.0, "size": 7.0, "box": 2.0}
    accumulate(model, detection, window, Sum(constants), IN_PLACE)
    for part in window:
        terms = {name: [*term, 1.0][:3] for name, term in detection(by_hand, part).items()}
        sum(w * total / constants[name] for name, (total, _, w) in terms.items()).backward()
    assert relative(gradient(model), gradient(by_hand)) < TIGHT
    with pytest.raises(BadInputError, match="term 'box' counts nothing in the first window"):
        accumulate(Net(), detection, window, Sum({"class": 3.0, "size": 1.0}), IN_PLACE)


@pytest.mark.parametrize("steps", STEPS)
def test_a_clamp_is_of_the_windows_count(steps: int) -> None:
    """max(1, n), though most micro-batches hold none; where the window holds none, its sum over one."""
    x, labels, boxed = batch()
    for boxes in (boxed, torch.zeros_like(boxed)):

        def focal(model: nn.Module, part: Any) -> dict[str, Any]:
            out = model(part[0])
            return {
                "focal": (out.square().sum(), at_least(part[2].sum())),
                "size": (out.sum(), len(out)),
            }

        def counted(part: Any) -> dict[str, Any]:
            return {"focal": at_least(part[2].sum()), "size": len(part[0])}

        def whole(m: nn.Module, n: int = max(1, int(boxes.sum()))) -> Tensor:
            return m(x).square().sum() / n + m(x).sum() / len(x)

        expected, exact = large(whole)
        window = split((x, labels, boxes), steps)
        for counter in (None, counted):
            if counter:
                focal.count = counter  # type: ignore[attr-defined]
            model = Net()
            loss = accumulate_gradients(model, focal, window)
            assert relative(gradient(model), exact) < TIGHT
            assert loss.mean == pytest.approx(float(expected), rel=1e-13)


def uncertainty(model: Any, micro_batch: Any) -> dict[str, Any]:
    """Two terms with learned weights, exp(−s)·L + s, where L is a sum, and one a function of sums."""
    x, labels, _ = micro_batch
    out, s = model(x), model.log_variance
    return {
        "class": (F.cross_entropy(out, labels, reduction="sum"), (labels != -100).sum(), torch.exp(-s)),
        "log variance": (s * len(x), len(x)),
        "spread": (torch.stack([out.sum(), out.square().sum()]), len(x), s, lambda m: m[1] - m[0] ** 2),
    }


def test_a_pair_says_its_clamp_otherwise() -> None:
    """By a method, since the window is counted before; the message names both ways."""
    with pytest.raises(BadInputError, match=r"mapping.*or have a method window_denominator"):
        accumulate_gradients(Net(), lambda model, part: (model(part[0]).sum(), at_least(3)), [batch()])


@pytest.mark.parametrize("steps", STEPS)
def test_a_learned_weight_gets_the_large_batchs_gradient(steps: int) -> None:
    """Its gradient is the term's mean over the window; for functions of sums as well."""
    x, labels, _ = batch()

    def whole(model: Any) -> Tensor:
        out, s = model(x), model.log_variance
        spread = out.square().sum() / len(x) - (out.sum() / len(x)) ** 2
        return torch.exp(-s) * F.cross_entropy(out, labels) + s + s * spread

    model = Net()
    expected, exact = large(whole)
    loss = accumulate_gradients(model, uncertainty, split(batch(), steps))
    assert relative(gradient(model), exact) < TIGHT
    assert loss.mean == pytest.approx(float(expected), rel=1e-13)
    assert model.log_variance.grad is not None
    assert abs(model.log_variance.grad) > 1e-3


@pytest.mark.parametrize("steps", STEPS)
def test_what_a_function_holds_itself_gets_its_gradient(steps: int) -> None:
    """A temperature inside `of`, which no micro-batch's sums hold."""

    def loss_fn(model: Any, part: Any) -> dict[str, Any]:
        sums = model(part[0]).softmax(1).sum(0)
        return {
            "cold": (sums, len(part[0]), 2.0, lambda m: (m * model.log_variance.exp()).square().sum())
        }

    model = Net()
    accumulate_gradients(model, loss_fn, split(batch(), steps))
    x = batch()[0]
    _, exact = large(lambda m: 2 * (m(x).softmax(1).mean(0) * m.log_variance.exp()).square().sum())  # type: ignore[operator]
    assert relative(gradient(model), exact) < TIGHT


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("reduction", ["global_mean", "mean", "sum"])
def test_a_weight_that_changes_inside_the_window_is_an_error(as_tensor: bool, reduction: Any) -> None:
    """With the term's name and both numbers; before any gradient where the window is counted first."""
    weights = iter([0.5, 0.5, 0.25])

    def loss_fn(model: nn.Module, part: Any) -> dict[str, Any]:
        weight = next(weights)
        return {"a": (model(part[0]).sum(), len(part[0]), torch.tensor(weight) if as_tensor else weight)}

    model = Net()
    with pytest.raises(BadInputError, match=r"term 'a': its weight is 0.5 and.* 0.25"):
        accumulate_gradients(model, loss_fn, split(batch(), 3), reduction=reduction)
    if reduction == "global_mean":
        assert not gradient(model).any()


@pytest.mark.parametrize("steps", STEPS)
def test_the_counting_pass_draws_what_the_passes_draw(steps: int) -> None:
    """Dropout: the gradient is that of the masks which the generator gives the micro-batches in turn."""
    window, model, by_hand = split(batch(), steps), Net(0.4), Net(0.4)
    torch.manual_seed(3)
    accumulate_gradients(model, balance, window)
    after = torch.rand(1)
    torch.manual_seed(3)
    outputs = torch.cat([by_hand(part[0]) for part in window])
    p, labels = outputs.softmax(1), batch()[1]
    chosen = F.one_hot(p.argmax(1), 3).double()
    (F.cross_entropy(outputs, labels) + 0.7 * (p.mean(0) * chosen.mean(0)).sum()).backward()
    assert relative(gradient(model), gradient(by_hand)) < TIGHT
    assert torch.equal(after, torch.rand(1))


class Moving(Net):
    """State of every kind that a forward pass may move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.seen, self.log, self.queue = 0, [0], {"last": 0}
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.log.append(self.seen)
        self.queue["last"] = self.seen
        noise = torch.rand(len(x), 1, generator=self.own, dtype=x.dtype)
        return super().forward(self.norm(x) * noise + self.norm.num_batches_tracked * 0.01)


def test_what_the_counting_pass_moves_is_put_back() -> None:
    """Running statistics, counters, lists and a generator are as the window's own passes leave them."""
    window = split(batch(), 3)
    found = []
    for loss_fn in (detection, Counting()):
        model = Moving()
        accumulate_gradients(model, loss_fn, window)
        found.append((model, gradient(model)))
    (late, of_late), (counted, of_counted) = found
    assert relative(of_late, of_counted) < TIGHT
    assert (late.seen, late.log, late.queue) == (3, [0, 1, 2, 3], {"last": 3})
    assert torch.equal(late.norm.running_mean, counted.norm.running_mean)  # type: ignore[arg-type]
    assert late.norm.num_batches_tracked == 3
    assert torch.equal(late.own.get_state(), counted.own.get_state())


@pytest.mark.parametrize("strategy", ["in_place", "cached"])
def test_what_an_object_keeps_whose_method_is_the_loss_is_put_back(strategy: Any) -> None:
    """Its counter, its list and the statistics of a module beside the model move as in one pass each."""

    class Task:
        def __init__(self) -> None:
            self.calls, self.seen, self.beside = 0, [], nn.BatchNorm1d(5).double()

        def loss(self, model: nn.Module, part: Any) -> dict[str, Any]:
            self.calls += 1
            self.seen.append(len(part[0]))
            self.beside(part[0])
            return detection(model, part)

    task, window = Task(), split(batch(), 3)
    accumulate_gradients(Net(), task.loss, window, strategy=strategy)
    calls = 3 if strategy == "in_place" else 1
    assert (task.calls, sum(task.seen), int(task.beside.num_batches_tracked)) == (calls, SAMPLES, calls)  # type: ignore[arg-type]


def test_a_parameter_that_a_pass_moves_cannot_be_put_back() -> None:
    """A teacher's average: there is no copy of it, so the message says what to do."""
    teacher = Net().requires_grad_(False)

    def loss_fn(model: nn.Module, part: Any) -> dict[str, Any]:
        with torch.no_grad():
            teacher.last.weight.mul_(0.9)
        return detection(model, part)

    with pytest.raises(
        BadInputError, match=r"a forward pass moves Linear\.weight.*count\(micro_batch\)"
    ):
        accumulate_gradients(Net(), loss_fn, split(batch(), 3))


def test_a_window_without_a_term_steps_on_the_others_and_one_without_any_does_not() -> None:
    """Its terms are those that count; with none, denominator 0 and no gradient."""
    x, labels, boxed = batch()
    for loss_fn in (detection, Counting()):
        model = Net()
        loss = accumulate_gradients(model, loss_fn, split((x, labels, boxed & False), 3))
        assert set(loss.terms) == {"class", "size"}
        assert loss.denominator == 1
        assert gradient(model).isfinite().all()

    def nothing(model: nn.Module, part: Any) -> dict[str, Any]:
        return {"a": (model(part[0]).sum() * 0, 0), "b": (0.0, 0)}

    for reduction in ("global_mean", "mean", "sum"):
        model = Net()
        loss = accumulate_gradients(model, nothing, split(batch(), 3), reduction=reduction)  # type: ignore[arg-type]
        assert loss.denominator == 0
        assert not loss.terms
        assert not gradient(model).any()


def test_a_window_that_is_interrupted_goes_on_to_the_same_gradient() -> None:
    """After any micro-batch, with sums, counts, weights and slopes saved, into a new model."""
    window = split(batch(), 5)
    for loss_fn in (detection, uncertainty, balance, Counting()):
        whole = Net(0.3)
        torch.manual_seed(5)
        expected = accumulate_gradients(whole, loss_fn, window)
        for after in (1, 3):
            states: list[dict[str, Any]] = []
            begun = Net(0.3)
            torch.manual_seed(5)
            _interrupt(begun, loss_fn, window, after, states)
            torch.manual_seed(99)
            model = Net(0.3)
            state = AccumulatorState.from_state_dict(states[0], dict(model.named_parameters()))
            how = reduction_named("global_mean"), IN_PLACE
            loss = accumulate(model, loss_fn, window, *how, begun=state)
            assert torch.equal(gradient(model), gradient(whole))
            assert torch.equal(loss.mean, expected.mean)


def _interrupt(
    model: nn.Module, loss_fn: Any, window: list[Any], after: int, states: list[dict[str, Any]]
) -> None:
    from contextlib import contextmanager

    names = {p: n for n, p in model.named_parameters()}

    @contextmanager
    def around(state: AccumulatorState) -> Any:
        yield
        if state.passes_done == after:
            states.append(copy.deepcopy(state.state_dict(names)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accumulate(model, loss_fn, window, reduction_named("global_mean"), IN_PLACE, around=around)


def test_terms_are_buffered_and_scaled_as_a_plain_loss_is() -> None:
    """A bfloat16 model in a float32 buffer, earlier gradients, and a loss that is scaled."""
    window = [(x.bfloat16(), *rest) for x, *rest in split(batch(), 5)]
    model, strategy = Net().bfloat16(), Buffered(torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    accumulate(
        model, balance, window, reduction_named("global_mean"), strategy,
        backward=lambda loss: torch.autograd.backward(loss * 8),
    )  # fmt: skip
    assert model.first.weight.grad is not None
    assert model.first.weight.grad.dtype == torch.bfloat16
    exact = Net()
    accumulate_gradients(exact, balance, split(batch(), 1))
    assert relative(gradient(model).double(), 8 * gradient(exact) + 1) < 0.05


def test_inside_autocast_weights_keep_their_gradient() -> None:
    """Weights of a head that the counting pass casts first, without graph, in the loop's own cache."""

    def loss_fn(model: Any, part: Any) -> dict[str, Any]:
        hidden, boxed = model.first(part[0]), part[2]
        terms: dict[str, Any] = {"size": (hidden.square().sum(), len(hidden))}
        return terms | ({"box": (model.last(hidden[boxed]).sum(), boxed.sum())} if boxed.any() else {})

    found = []
    for steps in (1, 3):
        model = Net().float()
        with torch.autocast("cpu", torch.bfloat16):
            accumulate_gradients(model, loss_fn, [(x.float(), *r) for x, *r in split(batch(), steps)])
        found.append(gradient(model))
    assert relative(found[1], found[0]) < 0.02


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"a": 1.0}, "term 'a': is neither"),
        ({"a": (torch.zeros(2), 1)}, r"term 'a': its sum has the shape \(2,\).*need a function"),
        ({"a": (torch.zeros(()), None)}, "term 'a': is neither"),
        ({"a": (torch.zeros(2), 1, 1.0, lambda m: m)}, r"term 'a': its function gives the shape \(2,\)"),
    ],
)
def test_what_is_no_term_is_refused_by_name(terms: dict[str, Any], said: str) -> None:
    """At the first micro-batch."""
    with pytest.raises(BadInputError, match=said):
        accumulate_gradients(Net(), lambda model, part: terms, split(batch(), 2))


def test_terms_and_pairs_do_not_mix() -> None:
    """A pair after terms, terms after a pair, a count that is one number, a term nobody counted."""
    pair = (torch.zeros((), requires_grad=True), 1)
    several = {"a": pair}

    def alternating(*results: Any) -> Any:
        given_ = iter(results)
        return lambda model, part: next(given_)

    window = split(batch(), 2)
    with pytest.raises(BadInputError, match="returns a tuple"):
        accumulate_gradients(Net(), alternating(several, pair), window)
    with pytest.raises(BadInputError, match="terms in micro-batch 2 of a window, and a pair before"):
        accumulate_gradients(Net(), alternating(pair, several), window)
    one_number = alternating(several, several)
    one_number.count = lambda part: 1
    with pytest.raises(BadInputError, match="returns the terms a, and its count one number"):
        accumulate_gradients(Net(), one_number, window)
    later = alternating(several, {**several, "b": pair})
    later.count = lambda part: {"a": 1}
    with pytest.raises(BadInputError, match=r"term 'b' was not there.*count\(micro_batch\)"):
        accumulate_gradients(Net(), later, window)
    later = alternating(several, {**several, "b": (torch.ones(2), 1, 1.0, torch.sum)})
    counts = iter([{"a": 1, "b": 0}, {"a": 1, "b": 1}])
    later.count = lambda part: next(counts)
    with pytest.raises(BadInputError, match="term 'b' was not there"):
        accumulate_gradients(Net(), later, window)


def test_the_loss_of_a_window_is_a_number_where_one_is_wanted() -> None:
    """Its mean, as `loss.item()` and `float(loss)` of a loop that had a tensor there."""
    loss = WindowLoss(torch.tensor(6.0), 4)
    assert (loss.item(), float(loss), f"{float(loss):.1f}") == (1.5, 1.5, "1.5")
