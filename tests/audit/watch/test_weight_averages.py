"""An average of the weights that moves with each micro-batch, in every form that loops give it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gaccum_exp import watch
from gaccum_exp.audit.watch.watch import Watched
from tests.shortened import shortened

Update = Callable[[nn.Module], None]
DECAY = 0.9


def averaged_model(model: nn.Module) -> Update:
    return AveragedModel(model).update_parameters  # type: ignore[return-value]


def averaged_by_list(model: nn.Module) -> Update:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return average.update_parameters  # type: ignore[return-value]


def copied_module(model: nn.Module) -> Update:
    ema = copy.deepcopy(model)

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        for average, p in zip(ema.parameters(), model.parameters(), strict=True):
            average.mul_(DECAY).add_(p, alpha=1 - DECAY)

    return update


def data_of_a_copy(model: nn.Module) -> Update:
    ema = copy.deepcopy(model)

    def update(model: nn.Module) -> None:
        for average, p in zip(ema.parameters(), model.parameters(), strict=True):
            average.data = average.data * DECAY + p.data * (1 - DECAY)

    return update


def state_dict(model: nn.Module) -> Update:
    ema = {name: value.clone() for name, value in model.state_dict().items()}

    def update(model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            ema[name].lerp_(value, 1 - DECAY)

    return update


def copied_to(model: nn.Module) -> Update:
    ema = [p.detach().clone() for p in model.parameters()]

    def update(model: nn.Module) -> None:
        with torch.no_grad():
            for average, p in zip(ema, model.parameters(), strict=True):
                average.copy_(DECAY * average + (1 - DECAY) * p)

    return update


def made_anew(model: nn.Module) -> Update:
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            ema[name] = DECAY * ema[name] + (1 - DECAY) * p.detach()

    return update


def all_at_once(model: nn.Module) -> Update:
    ema = [p.detach().clone() for p in model.parameters()]

    def update(model: nn.Module) -> None:
        torch._foreach_mul_(ema, DECAY)
        torch._foreach_add_(ema, [p.detach() for p in model.parameters()], alpha=1 - DECAY)

    return update


FORMS = [
    *(averaged_model, averaged_by_list, copied_module, data_of_a_copy, state_dict),
    *(copied_to, made_anew, all_at_once),
]


@contextmanager
def training(update: Callable[[nn.Module], Update], where: str, n: int = 3) -> Iterator[Watched]:
    """Train with an average that moves there; its first move, which copies, comes before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = update(model)
    average(model)
    with watch(model, None, optimizer) as audit:
        for i in range(2 * n):
            if where == "before each pass":
                average(model)
            x, y = torch.randn(4, 3), torch.randint(2, (4,))
            (F.cross_entropy(model(x), y) / n).backward()
            if where == "after each pass":
                average(model)
            if (i + 1) % n == 0:
                if where == "before the step":
                    average(model)
                optimizer.step()
                optimizer.zero_grad()
                if where == "after the step":
                    average(model)
    yield audit


@pytest.mark.parametrize(
    "where", shortened(["before each pass", "after each pass"], ["after each pass"])
)
@pytest.mark.parametrize("form", FORMS, ids=[form.__name__ for form in FORMS])
def test_an_average_that_moves_with_each_micro_batch_is_named(
    form: Callable[[nn.Module], Update], where: str
) -> None:
    """With the line; the gradient is the large batch's all the same."""
    with training(form, where) as audit:
        assert [check.name for check in audit.checks] == ["average of the weights"]
        assert "move it once, after the optimizer's step" in audit.checks[0].finding
        assert "test_weight_averages.py:" in audit.checks[0].finding
        assert audit.verdict == "equivalent"


@pytest.mark.parametrize("where", shortened(["before the step", "after the step"], ["after the step"]))
@pytest.mark.parametrize("form", FORMS, ids=[form.__name__ for form in FORMS])
def test_one_that_moves_with_each_step_is_not(form: Callable[[nn.Module], Update], where: str) -> None:
    """Whichever side of the step it is on."""
    with training(form, where) as audit:
        assert audit.checks == ()


def difference(model: nn.Module) -> Update:
    """Log how far the weights have gone since the start, and since the micro-batch before."""
    start = [p.detach().clone() for p in model.parameters()]
    last = [s.clone() for s in start]

    def update(model: nn.Module) -> None:
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                ((p - start[i]).norm() + (p - last[i]).norm()).item()
                last[i] = p.clone()

    return update


def decay_by_hand(model: nn.Module) -> Update:
    """Add weight decay to the gradient, and keep a sum of the weights' norms."""
    norms: list[Tensor] = [torch.zeros(())]

    def update(model: nn.Module) -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.add_(p, alpha=1e-9)
                norms[0] += p.norm()

    return update


def copy_kept_equal(model: nn.Module) -> Update:
    """Keep a second model equal to the first, and a buffer that is cleared."""
    other = copy.deepcopy(model)
    sums = [torch.zeros_like(p) for p in model.parameters()]

    def update(model: nn.Module) -> None:
        other.load_state_dict(model.state_dict())
        for total, p in zip(sums, model.parameters(), strict=True):
            total.zero_()
            total.add_(p.detach())

    return update


@pytest.mark.parametrize("what", [difference, decay_by_hand, copy_kept_equal], ids=lambda f: f.__name__)
def test_what_else_is_done_with_weights_is_no_average(what: Callable[[nn.Module], Update]) -> None:
    """In each micro-batch: differences, norms, a decay in the gradient, a copy."""
    with training(what, "after each pass") as audit:
        assert audit.checks == ()
