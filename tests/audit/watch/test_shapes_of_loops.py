"""Shapes that loops have: state carried over, losses kept, stacked and packed, closures, checkpoints.

Each loop divides rightly (its divisor is N, or what the window counts), and a twin of it does not. Both
are measured against the loss of the whole window, taken by hand in float64.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gaccum_exp import watch
from tests.audit.loops import Stepped, stepped
from tests.audit.support import whole

D = torch.float64
SOUND = ("equivalent", "identical")
ce = F.cross_entropy
Parts = Sequence[tuple[Tensor, ...]]
Loop = Callable[[float], Stepped]
LOOPS: dict[str, Loop] = {}
"""By name: what runs and watches a loop whose losses are divided by rightly, times a number."""


def loop(run_it: Loop) -> Loop:
    """Register a loop."""
    LOOPS[run_it.__name__] = run_it
    return run_it


def net(outputs: int = 3) -> nn.Sequential:
    """Return a small network of 5 inputs."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def data(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these sizes (three of four), with labels of three classes."""
    torch.manual_seed(2)
    return [(torch.randn(n, 5, dtype=D), torch.randint(3, (n,))) for n in sizes or (4, 4, 4)]


def run(model: nn.Module, given: Any, fn: Any, parts: Parts, divisor: float, times: float) -> Stepped:
    """Watch a loop that divides `fn(model, *micro_batch)`, and measure it against that of the window."""

    def passes(m: nn.Module, o: Any) -> None:
        for part in parts:
            (fn(m, *part) * times / divisor).backward()

    return stepped(model, given, passes, lambda m: fn(m, *whole(parts)))


# A state carried from pass to pass, as in truncated back-propagation through time.


def recurrent(kind: type[nn.RNNBase], times: float, carry: Callable[[Any], Any]) -> Stepped:
    torch.manual_seed(3)
    model = kind(5, 3, batch_first=True).double()
    parts = [(torch.randn(4, 6, 5, dtype=D), torch.randint(3, (4,))) for _ in range(3)]

    def losses(m: nn.Module) -> Any:
        state = None
        for x, y in parts:
            out, state = m(x) if state is None else m(x, state)
            yield ce(out[:, -1], y)
            state = carry(state)

    def passes(m: nn.Module, o: Any) -> None:
        for loss in losses(m):
            (loss * times / 3).backward()

    return stepped(model, None, passes, lambda m: sum(loss / 3 for loss in losses(m)))


def zeros(*more: int) -> Tensor:
    return torch.zeros(1, 4, 3, dtype=D)


def carried(kind: type[nn.RNNBase], times: float, carry: Callable[[Any], Any], one: bool) -> Stepped:
    """Watch a loop whose every pass gets a state; the first one's is zero."""
    torch.manual_seed(3)
    model = kind(5, 3, batch_first=True).double()
    parts = [(torch.randn(4, 6, 5, dtype=D), torch.randint(3, (4,))) for _ in range(3)]

    def losses(m: nn.Module) -> Any:
        state: Any = zeros() if one else (zeros(), zeros())
        for x, y in parts:
            out, state = m(x, state)
            yield ce(out[:, -1], y)
            state = carry(state)

    def passes(m: nn.Module, o: Any) -> None:
        for loss in losses(m):
            (loss * times / 3).backward()

    return stepped(model, None, passes, lambda m: sum(loss / 3 for loss in losses(m)))


@loop
def hidden_state_detached(times: float) -> Stepped:
    return carried(nn.GRU, times, lambda h: h.detach(), True)


@loop
def hidden_and_cell_detached(times: float) -> Stepped:
    return carried(nn.LSTM, times, lambda s: tuple(h.detach() for h in s), False)


@loop
def hidden_state_by_data(times: float) -> Stepped:
    return carried(nn.RNN, times, lambda h: h.data.clone(), True)


@loop
def hidden_state_within_a_micro_batch(times: float) -> Stepped:
    """A micro-batch of two passes and one backward pass: the second begins with the first's state."""
    torch.manual_seed(3)
    model = nn.GRU(5, 3, batch_first=True).double()
    parts = [(torch.randn(4, 6, 5, dtype=D), torch.randint(3, (4,))) for _ in range(3)]

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        out, state = m(x[:, :3])
        return ce(out[:, -1], y) + ce(m(x[:, 3:], state.detach())[0][:, -1], y)

    return run(model, None, fn, parts, 3, times)


# Criteria that return several losses.


class SetCriterion(nn.Module):
    """Returns losses by name, and their weighted sum among them where it is told to."""

    def __init__(self, total: bool = False) -> None:
        super().__init__()
        self.total = total

    def forward(self, out: Tensor, y: Tensor) -> Any:
        losses = {"ce": ce(out, y), "size": out.pow(2).mean()}
        return (losses["ce"] + 5 * losses["size"], losses) if self.total else losses


def weighed(m: nn.Module, x: Tensor, y: Tensor, criterion: Any) -> Tensor:
    losses = criterion(m(x), y)
    return losses["ce"] + 5 * losses["size"]


@loop
def criterion_of_a_mapping(times: float) -> Stepped:
    criterion = SetCriterion()
    return run(net(), criterion, lambda m, x, y: weighed(m, x, y, criterion), data(), 3, times)


@loop
def criterion_of_a_total_and_its_parts(times: float) -> Stepped:
    criterion = SetCriterion(total=True)
    return run(net(), criterion, lambda m, x, y: criterion(m(x), y)[0], data(), 3, times)


@loop
def function_of_two_losses(times: float) -> Stepped:
    def vae(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.mse_loss(out[:, :5], x), 0.5 * out[:, 5:].pow(2).sum(1).mean()

    return run(net(7), vae, lambda m, x, y: sum(vae(m(x), x)), data(), 3, times)


@loop
def function_of_a_vector_of_losses(times: float) -> Stepped:
    def yolo(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.stack([ce(out, y), out.pow(2).mean(), out.abs().mean()])
        return losses, losses.detach()

    return run(net(), yolo, lambda m, x, y: yolo(m(x), y)[0].sum(), data(), 3, times)


# Outputs that are objects.


class Returning(nn.Module):
    """A network whose outputs, and what else it is given, a function packs."""

    def __init__(self, pack: Callable[..., Any], outputs: int = 3) -> None:
        super().__init__()
        self.inner, self.pack = net(outputs), pack

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.pack(self.inner(x), *more)


@loop
def actor_of_categories(times: float) -> Stepped:
    model = Returning(lambda out: Categorical(logits=out))
    parts = [(x, y, x[:, 0]) for x, y in data()]
    return run(model, None, lambda m, x, y, a: (m(x).log_prob(y) * a).mean(), parts, 3, times)


@loop
def actor_and_critic(times: float) -> Stepped:
    def pack(out: Tensor) -> Any:
        return Independent(Normal(out[:, :2], out[:, 2:4].exp()), 1), out[:, 4]

    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        policy, value = m(x)
        surrogate = -(policy.log_prob(x[:, :2]) * x[:, 2]).mean()
        return surrogate + 0.5 * F.mse_loss(value, x[:, 3]) - 0.01 * policy.entropy().mean()

    return run(Returning(pack, 5), None, fn, data(), 3, times)


@loop
def distribution_given_to_the_loss(times: float) -> Stepped:
    def loss(policy: Any, y: Tensor) -> Tensor:
        return -policy.log_prob(y).mean()

    model = Returning(lambda out: Categorical(logits=out))
    return run(model, loss, lambda m, x, y: loss(m(x), y), data(), 3, times)


@loop
def namespace_with_a_loss(times: float) -> Stepped:
    model = Returning(lambda out, y: SimpleNamespace(loss=ce(out, y), logits=out))
    return run(model, None, lambda m, x, y: m(x, y).loss, data(), 3, times)


@loop
def namespace_of_logits(times: float) -> Stepped:
    model = Returning(lambda out: SimpleNamespace(heads=[SimpleNamespace(logits=out)]))
    criterion = nn.CrossEntropyLoss()
    return run(model, criterion, lambda m, x, y: criterion(m(x).heads[0].logits, y), data(), 3, times)


# Micro-batches of one sample.


def by_sample(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), x[:, :3], reduction="none").mean(1).mean()


@loop
def one_sample_each(times: float) -> Stepped:
    return run(net(), None, by_sample, data(1, 1, 1), 3, times)


def averaged_by_sample(criterion: Any, given: Any, times: float, *sizes: int) -> Stepped:
    parts = data(*sizes)

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in parts:
            (criterion(m(x), y).mean() * len(x) * times / sum(sizes)).backward()

    return stepped(net(), given, passes, lambda m: ce(m(whole(parts)[0]), whole(parts)[1]))


@loop
def one_sample_among_others(times: float) -> Stepped:
    criterion = nn.CrossEntropyLoss(reduction="none")
    return averaged_by_sample(criterion, criterion, times, 2, 1, 3)


@loop
def one_sample_each_by_a_function(times: float) -> Stepped:
    return averaged_by_sample(lambda o, y: ce(o, y, reduction="none"), None, times, 1, 1, 1, 1)


@loop
def loss_with_a_dimension(times: float) -> Stepped:
    def criterion(out: Tensor, y: Tensor) -> Tensor:
        return ce(out, y).unsqueeze(0)

    return run(
        net(), criterion, lambda m, x, y: criterion(m(x), y).mean(), data(4, 4, 1, 1)[:2], 2, times
    )


# Pairs in one pass.


@loop
def chosen_and_rejected_joined(times: float) -> Stepped:
    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(torch.cat([x, x.flip(1)])).log_softmax(-1)[:, 0]
        return -F.logsigmoid(out[: len(x)] - out[len(x) :]).mean()

    return run(net(), None, fn, data(), 3, times)


@loop
def pairs_side_by_side(times: float) -> Stepped:
    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(torch.stack([x, x.flip(1)], 1).flatten(0, 1))[:, 0]
        return F.softplus(out[1::2] - out[0::2]).mean()

    return run(net(), None, fn, data(), 3, times)


@loop
def triplets_in_chunks(times: float) -> Stepped:
    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        anchor, positive, negative = m(torch.cat([x, x + 0.1, x.flip(1)])).chunk(3)
        near, far = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
        return F.relu(near - far + 1).mean()

    return run(net(), None, fn, data(), 3, times)


@loop
def one_pair_each(times: float) -> Stepped:
    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        chosen, rejected = m(torch.cat([x, x.flip(1)]))[:, 0].chunk(2)
        return F.softplus(rejected - chosen).mean()

    return run(net(), None, fn, data(1, 1, 1), 3, times)


# Losses that the model leaves behind, or returns beside its outputs.


class Router(nn.Module):
    """Keeps a mean over samples in an attribute, or in a list of one of its parts."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.where, self.a, self.b = where, nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x)
        aux = hidden.logsumexp(-1).pow(2).mean()
        if self.where == "attribute":
            self.aux, self.temperature = aux, self.b.weight.abs().mean()
        elif self.where == "list":
            self.a.losses = [aux, 2 * aux]  # type: ignore[assignment]  # as strangers do
        out = self.b(hidden.tanh())
        return (out, aux) if self.where == "beside" else out


@loop
def auxiliary_loss_in_an_attribute(times: float) -> Stepped:
    return run(Router("attribute"), None, lambda m, x, y: ce(m(x), y) + 0.1 * m.aux, data(), 3, times)


@loop
def auxiliary_losses_of_the_parts(times: float) -> Stepped:
    criterion = nn.CrossEntropyLoss()

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = criterion(m(x), y)
        for part in m.modules():
            loss = loss + 0.1 * sum(getattr(part, "losses", []))
        return loss

    return run(Router("list"), criterion, fn, data(), 3, times)


@loop
def auxiliary_loss_beside_the_outputs(times: float) -> Stepped:
    criterion = nn.CrossEntropyLoss()

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        out, aux = m(x)
        return criterion(out, y) + 0.1 * aux

    return run(Router("beside"), criterion, fn, data(), 3, times)


class Scaled(nn.Module):
    """Returns its outputs, scaled or not, and the scale; keeps it in an attribute, too."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.inner, self.scaled = net(), scaled
        self.log = nn.Parameter(torch.ones((), dtype=D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.scale = self.log.exp()
        out = self.inner(x)
        return (out * self.scale if self.scaled else out), self.scale


@loop
def temperature_beside_the_outputs(times: float) -> Stepped:
    """A scalar that the model returns is no loss where it scales the outputs."""

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        out, scale = m(x)
        return ce(scale * out, y)

    return run(Scaled(False), None, fn, data(), 3, times)


@loop
def temperature_inside(times: float) -> Stepped:
    criterion = nn.CrossEntropyLoss()
    return run(Scaled(True), criterion, lambda m, x, y: criterion(m(x)[0], y), data(), 3, times)


# One backward pass for losses that a list holds.


def listed(collect: Callable[[list[Tensor]], Tensor], sizes: Sequence[int], reduction: str) -> Stepped:
    parts = data(*sizes)

    def passes(m: nn.Module, o: Any) -> None:
        collect([ce(m(x), y, reduction=reduction) for x, y in parts]).backward()

    return stepped(net(), None, passes, lambda m: ce(m(whole(parts)[0]), whole(parts)[1]))


@loop
def stacked_and_summed(times: float) -> Stepped:
    return listed(lambda each: torch.stack(each).sum() * times / 3, (4, 4, 4), "mean")


@loop
def stacked_and_averaged(times: float) -> Stepped:
    return listed(lambda each: torch.stack(each).mean() * times, (4, 4, 4), "mean")


@loop
def stacked_and_weighed(times: float) -> Stepped:
    sizes = torch.tensor([5, 2, 4], dtype=D)
    return listed(lambda each: (torch.stack(each) * sizes).sum() * times / 11, (5, 2, 4), "mean")


@loop
def joined_with_a_dimension(times: float) -> Stepped:
    def collect(each: list[Tensor]) -> Tensor:
        return torch.cat([loss.view(1) for loss in each]).mean() * times

    return listed(collect, (4, 4, 4), "mean")


# Reentrant checkpoints around the model, and around its parts.


@loop
def model_under_a_checkpoint(times: float) -> Stepped:
    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return ce(checkpoint(m, x.clone().requires_grad_(), use_reentrant=True), y)

    return run(net(), None, fn, data(), 3, times)


@loop
def parts_under_checkpoints(times: float) -> Stepped:
    criterion = nn.CrossEntropyLoss()

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = checkpoint(lambda v: m[1](m[0](v)), x.clone().requires_grad_(), use_reentrant=True)
        return criterion(checkpoint(m[2], hidden, use_reentrant=True), y)

    return run(net(), criterion, fn, data(), 3, times)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_every_shape_are_judged(name: str) -> None:
    """Divided rightly each is the large batch's; three times that is called so."""
    audit, gap, rounding = LOOPS[name](1)
    assert gap <= rounding, gap
    assert audit.verdict in SOUND, str(audit)
    assert len(audit.windows) == 1
    audit, gap, _ = LOOPS[name](3)
    assert gap > 1
    assert (audit.verdict, audit.cause) == ("biased", "loss scale"), str(audit)


def test_sums_in_one_tensor_are_judged_as_sums() -> None:
    """Sums that are stacked, and divided once by what the window counts, are the large batch's."""
    audit, gap, rounding = listed(lambda each: torch.stack(each).sum() / 11, (5, 2, 4), "sum")
    assert gap <= rounding
    assert (audit.verdict, audit.reduction, audit.accum_steps) == ("equivalent", "global_mean", 3)
    assert [check.name for check in audit.checks] == ["memory"]


def test_means_in_one_tensor_of_unequal_micro_batches_are_told() -> None:
    """The mean of stacked means is the large batch's only where all count the same."""
    audit, gap, _ = listed(lambda each: torch.stack(each).mean(), (5, 2, 4), "mean")
    assert gap > 1e-3
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators"), str(audit)


def test_a_vector_of_what_is_no_mean_stays_coupled() -> None:
    """Samples that are paired with others, as by a flip, are still told from pairs of one sample."""

    def fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)[:, 0]
        return F.softplus(out - out.flip(0)).mean()

    audit = run(net(), None, fn, data(), 3, 1).audit
    assert (audit.verdict, audit.cause) == ("inconclusive", "loss not additive over samples")


HARDEST: dict[str, Callable[[Tensor], Tensor]] = {
    "the largest losses": lambda out: out[:, 0].square().topk(1).values.mean(),
    "their distance": lambda out: F.pdist(out).mean(),
}


@pytest.mark.parametrize("name", HARDEST)
@pytest.mark.parametrize("size", [2, 4])
def test_few_samples_that_make_one_number_are_not_taken_for_one_sample(name: str, size: int) -> None:
    """Two samples of which the loss takes one, or whose distance it takes, are two."""
    audit = run(net(), None, lambda m, x, y: HARDEST[name](m(x)), data(size, size), 2, 1).audit
    assert audit.verdict == "inconclusive", str(audit)


def test_samples_mixed_between_two_calls_of_the_model_are_told() -> None:
    """What the loop centres over a micro-batch before the next part of the model is not judged equal."""

    def fn(m: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = m[0](x)
        return ce(m[2](m[1](hidden - hidden.mean(0))), y)

    audit = run(net(), None, fn, data(), 3, 1).audit
    assert audit.verdict == "inconclusive", str(audit)


def test_features_of_the_micro_batch_before_are_no_part_of_this_one() -> None:
    """A queue that a loop keeps by detach() makes the passes no single micro-batch, and is told."""

    def passes(m: nn.Module, o: Any) -> None:
        queue = torch.zeros(4, 3, dtype=D)
        for x, _ in data():
            out = m(x)
            (F.mse_loss(out, queue) / 3).backward()
            queue = out.detach()

    torch.manual_seed(0)
    model = net()
    with watch(model, None, optimizer := torch.optim.SGD(model.parameters(), 0.1)) as audit:
        passes(model, optimizer)
        optimizer.step()
    assert audit.accum_steps == 3
    assert (audit.verdict, audit.cause) == ("inconclusive", "state moves in the window"), str(audit)


@pytest.mark.parametrize("fault", ["none", "no zero_grad", "second evaluation"])
def test_every_evaluation_of_a_closure_is_judged(fault: str) -> None:
    """One audit a step, of its worst evaluation; the first alone would be sound."""
    model, parts, evaluations = net(), data(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> float:
        evaluations.append(1)
        if fault != "no zero_grad":
            optimizer.zero_grad()
        divisor = 1 if fault == "second evaluation" and len(evaluations) == 2 else 3
        losses = [ce(model(x), y) / divisor for x, y in parts]
        for loss in losses:
            loss.backward()
        return sum(float(loss.detach()) for loss in losses)

    with watch(model, None, optimizer) as audit:
        optimizer.step(closure)  # type: ignore[arg-type]  # a number is enough
        optimizer.step(closure)  # type: ignore[arg-type]
    assert len(evaluations) > 4
    assert len(audit.windows) == 2
    causes = {"no zero_grad": "stale or missing gradients", "second evaluation": "loss scale"}
    assert audit.cause == causes.get(fault), str(audit)
    assert audit.verdict == ("equivalent" if fault == "none" else "biased")
    assert fault == "none" or "at evaluation 2 of the step's closure" in str(audit)


def said_of(passes: Callable[[nn.Module, Any], None], model: nn.Module | None = None) -> str:
    """Return what is said of a loop that takes its steps itself."""
    model = net() if model is None else model
    with watch(model, None, optimizer := torch.optim.SGD(model.parameters(), 0.1)) as audit:
        passes(model, optimizer)
    return str(audit)


@pytest.mark.parametrize("unscaled", [True, False])
def test_a_forgotten_unscale_is_told_by_its_name(unscaled: bool) -> None:
    """Clipped at the loss's scale the gradient is too small; unscaled first it is the large batch's."""

    def passes(m: nn.Module, o: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for x, y in data():
            scaler.scale(ce(m(x), y) / 3).backward()
        if unscaled:
            scaler.unscale_(o)
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        scaler.step(o)

    said = said_of(passes)
    assert said.startswith("equivalent" if unscaled else "biased"), said
    assert ("256 × as large as they are: call unscale_" in said) == (not unscaled), said


def test_gradients_divided_after_each_pass_are_not_called_missing() -> None:
    """All micro-batches are there, the earlier ones divided again and again."""

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            ce(m(x), y).backward()
            for parameter in m.parameters():
                parameter.grad /= 128  # type: ignore[operator]
        o.step()

    said = said_of(passes)
    assert said.startswith("biased")
    assert "missing:" not in said, said
    assert "are missing" not in said, said
    assert "leave .grad alone until the window's last backward pass" in said, said


def test_zero_grad_between_forward_and_backward_is_told() -> None:
    """The first half of the window is gone, and zero_grad is what takes it."""

    def passes(m: nn.Module, o: Any) -> None:
        for i, (x, y) in enumerate(data(4, 4, 4, 4)):
            loss = ce(m(x), y) / 4
            if i == 2:
                o.zero_grad()
            loss.backward()
        o.step()

    said = said_of(passes)
    assert "call zero_grad once per optimizer step" in said, said


def test_a_backward_pass_written_by_hand_is_blamed_and_not_the_loss() -> None:
    """A function whose own backward divides by the number of its rows mixes no sample forward."""

    class Divided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] / len(gradients[0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()

        def forward(self, x: Tensor) -> Any:
            return self.last(Divided.apply(self.first(x)))  # type: ignore[no-untyped-call]

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (ce(m(x), y) / 3).backward()
        o.step()

    said = said_of(passes, Model())
    assert "a backward pass written by hand" in said, said
    assert "strategy=cached" not in said


def test_a_penalty_that_is_not_divided_is_named_once() -> None:
    """However many parameters it sums over, one clause says it."""

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (ce(m(x), y) / 3 + sum(0.01 * p.square().sum() for p in m.parameters())).backward()
        o.step()

    said = said_of(passes)
    assert said.count("of the penalty on the weights the gradient is 3 × the large batch's") == 1, said


def test_passes_after_the_last_step_are_printed() -> None:
    """Gradients that no step has taken leak into the next epoch."""

    def passes(m: nn.Module, o: Any) -> None:
        for i, (x, y) in enumerate(data(4, 4, 4, 4, 4)):
            (ce(m(x), y) / 3).backward()
            if i == 2:
                o.step()
                o.zero_grad()

    assert "left over: 2 backward passes after the last step" in said_of(passes)


def test_graphs_joined_without_their_offsets_are_not_said_to_have_no_gradient() -> None:
    """The indices of one graph point to nodes of another when they are joined."""

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(2)

        def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Any:
            hidden = x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            out = self.inner(hidden)
            return torch.zeros(2, 2, dtype=D).index_add(0, graph, out)

    def passes(m: nn.Module, o: Any) -> None:
        torch.manual_seed(5)
        for _ in range(2):
            edges, graph = torch.randint(6, (2, 8)), torch.tensor([0, 0, 0, 1, 1, 1])
            out = m(torch.randn(6, 5, dtype=D), edges, graph)
            (ce(out, torch.tensor([0, 1])) / 2).backward()
        o.step()

    said = said_of(passes, Graphs())
    assert said.startswith("inconclusive"), said
    assert "zero but for rounding" not in said, said
