"""Loops as people write them, kind by kind: what `watch` says of each is what a newcomer needs to hear.

Sound loops step on the large batch's gradient, up to a weight that the loss itself has; the others do
not. Each is a window of micro-batches of four samples unless it says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch

D = torch.float64
SOUND = ("equivalent", "identical")
SCALE, UNEQUAL = "loss scale", "unequal denominators"
STALE, COUPLED = "stale or missing gradients", "loss not additive over samples"
ce = F.cross_entropy
LOOPS: dict[str, tuple[Callable[[], Any], str, str | None]] = {}
"""By name: what runs and watches it, the verdict (`sound` for either of two), and the cause."""


def loop(verdict: str, cause: str | None = None) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a loop."""

    def register(run_it: Callable[[], Any]) -> Callable[[], Any]:
        LOOPS[run_it.__name__] = run_it, verdict, cause
        return run_it

    return register


def net(outputs: int = 3) -> nn.Module:
    """Return a small network of 5 inputs."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def data(sizes: Sequence[int] = (4, 4, 4, 4), inputs: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these sizes, with labels of three classes."""
    torch.manual_seed(2)
    return [(torch.randn(n, inputs, dtype=D), torch.randint(3, (n,))) for n in sizes]


def run(model: nn.Module, criterion: Any, passes: Callable[[nn.Module, Any], None]) -> Any:
    """Watch the passes of one window and its step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, criterion, optimizer) as audit:
        passes(model, optimizer)
        optimizer.step()
    return audit


@loop("sound")
def half_of_the_squares_in_a_function() -> Any:
    m = net(1)

    def fn(model: Any, x: Any, y: Any) -> Tensor:
        return 0.5 * ((model(x)[:, 0] - y) ** 2).mean()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4, 4)):
            (fn(m, x, y.double()) / 2).backward()

    return run(m, fn, passes)


@loop("sound")
def half_of_the_squares_in_the_loop() -> Any:
    m = net(1)

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4, 4)):
            (0.5 * F.mse_loss(m(x)[:, 0], y.double()) / 2).backward()

    return run(m, None, passes)


@loop("biased", SCALE)
def divided_inside_and_outside() -> Any:
    n = 3

    def fn(model: Any, x: Any, y: Any) -> Tensor:
        return ce(model(x), y) / n

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4, 4, 4)):
            (fn(m, x, y) / n).backward()

    return run(net(), fn, passes)


@loop("biased", SCALE)
def two_terms_divided_twice() -> Any:
    n = 4

    def fn(model: Any, x: Any, y: Any) -> Tensor:
        z = model(x)
        return (ce(z, y) + 0.1 * (z**2).mean()) / n

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (fn(m, x, y) / n).backward()

    return run(net(), fn, passes)


@loop("sound")
def div_inside_two_terms_each() -> Any:
    n = 4

    def fn(model: Any, x: Any, y: Any) -> Tensor:
        z = model(x)
        return ce(z, y) / n + 0.1 * (z**2).mean() / n

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            fn(m, x, y).backward()

    return run(net(), fn, passes)


@loop("biased", SCALE)
def undivided_fn_two_terms() -> Any:
    def fn(model: Any, x: Any, y: Any) -> Tensor:
        z = model(x)
        return ce(z, y) + 0.1 * (z**2).mean()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            fn(m, x, y).backward()

    return run(net(), fn, passes)


@loop("sound")
def penalty_in_loop_criterion_given() -> Any:
    c = nn.CrossEntropyLoss()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x)
            ((c(z, y) + 0.1 * (z**2).mean()) / 4).backward()

    return run(net(), c, passes)


@loop("sound")
def weight_penalty_in_loop() -> Any:
    c = nn.CrossEntropyLoss()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x)
            ((c(z, y) + 0.01 * sum(p.pow(2).sum() for p in m.parameters())) / 4).backward()

    return run(net(), c, passes)


@loop("sound")
def handwritten_none() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x).log_softmax(-1)
            (-(z.gather(1, y[:, None])).mean() / 4).backward()

    return run(net(), None, passes)


@loop("biased", UNEQUAL)
def handwritten_masked_mean() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for k, (x, y) in enumerate(data()):
            z = m(x).log_softmax(-1)
            w = (torch.arange(4) < k + 1).double()
            (-(z.gather(1, y[:, None])[:, 0] * w).sum() / w.sum() / 4).backward()

    return run(net(), None, passes)


@loop("sound")
def handwritten_masked_global() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for k, (x, y) in enumerate(data()):
            z = m(x).log_softmax(-1)
            w = (torch.arange(4) < k + 1).double()
            (-(z.gather(1, y[:, None])[:, 0] * w).sum() / 10).backward()

    return run(net(), None, passes)


@loop("sound")
def elementwise_none_weighted() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            w = torch.rand(4, dtype=D)
            ((ce(m(x), y, reduction="none") * w).mean() / 4).backward()

    return run(net(), None, passes)


@loop("sound")
def elementwise_criterion_mean() -> Any:
    c = nn.CrossEntropyLoss(reduction="none")

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (c(m(x), y).mean() / 4).backward()

    return run(net(), c, passes)


@loop("biased", COUPLED)
def rmse_sqrt() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (torch.sqrt(F.mse_loss(m(x)[:, 0], y.double())) / 4).backward()

    return run(net(1), None, passes)


@loop("biased", UNEQUAL)
def ce_plus_masked_unequal() -> Any:
    def fn(model: Any, x: Any, y: Any, k: Any) -> Tensor:
        z = model(x)
        return ce(z, y) + ((z**2).sum(1) * k).sum() / k.sum()

    def passes(m: nn.Module, o: Any) -> None:
        for j, (x, y) in enumerate(data()):
            (fn(m, x, y, (torch.arange(4) < j + 1).double()) / 4).backward()

    return run(net(), fn, passes)


@loop("biased", COUPLED)
def ce_plus_dice() -> Any:
    def fn(model: Any, x: Any, y: Any) -> Tensor:
        z = model(x)
        p = z.softmax(-1)[:, 1]
        t = (y == 1).double()
        return ce(z, y) + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (fn(m, x, y) / 4).backward()

    return run(net(), fn, passes)


@loop("sound")
def real_fake_own_backward() -> Any:
    m = net(1)
    b = nn.BCEWithLogitsLoss()
    one, zero = torch.ones(4, 1, dtype=D), torch.zeros(4, 1, dtype=D)

    def passes(m: nn.Module, o: Any) -> None:
        for x, _y in data():
            (b(m(x), one) / 4).backward()
            (b(m(x * 2 + 1), zero) / 4).backward()

    return run(m, b, passes)


@loop("biased", SCALE)
def real_fake_own_backward_undivided() -> Any:
    m = net(1)
    b = nn.BCEWithLogitsLoss()
    one, zero = torch.ones(4, 1, dtype=D), torch.zeros(4, 1, dtype=D)

    def passes(m: nn.Module, o: Any) -> None:
        for x, _y in data():
            b(m(x), one).backward()
            b(m(x * 2 + 1), zero).backward()

    return run(m, b, passes)


@loop("sound")
def sum_then_one_backward() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        t = 0
        for x, y in data():
            t = t + ce(m(x), y) / 4
        t.backward()

    return run(net(), None, passes)


@loop("sound")
def unrolled_two() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        a, b = data((4, 4))
        (ce(m(a[0]), a[1]) / 2).backward()
        (ce(m(b[0]), b[1]) / 2).backward()

    return run(net(), None, passes)


@loop("biased", SCALE)
def unrolled_two_undivided() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        a, b = data((4, 4))
        ce(m(a[0]), a[1]).backward()
        ce(m(b[0]), b[1]).backward()

    return run(net(), None, passes)


@loop("sound")
def fixmatch_missing_unlabelled() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        ds = data()
        for k, (x, y) in enumerate(ds):
            loss = ce(m(x), y) / 4
            if k != 1:
                loss = loss + 0.5 * ce(m(x + 1), y, reduction="sum") / 12
            loss.backward()

    return run(net(), None, passes)


@loop("sound")
def few_params_sound() -> Any:
    m = nn.Linear(1, 1).double()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((3, 3, 3, 3), inputs=1):
            (F.mse_loss(m(x)[:, 0], y.double()) / 4).backward()

    return run(m, None, passes)


@loop("biased", UNEQUAL)
def few_params_masked() -> Any:
    m = nn.Linear(1, 1).double()

    def fn(p: Any, y: Any, k: Any) -> Tensor:
        return ((p[:, 0] - y) ** 2 * k).sum() / k.sum()

    def passes(m: nn.Module, o: Any) -> None:
        for j, (x, y) in enumerate(data((4, 4, 4, 4), inputs=1)):
            (fn(m(x), y.double(), (torch.arange(4) <= j).double()) / 4).backward()

    return run(m, fn, passes)


@loop("biased", COUPLED)
def few_params_coupled() -> Any:
    m = nn.Linear(1, 1).double()

    def fn(p: Any, y: Any) -> Tensor:
        return (p * y[:, None]).mean() / (p.std() + 1)

    def passes(m: nn.Module, o: Any) -> None:
        for _j, (x, y) in enumerate(data((4, 4, 4, 4), inputs=1)):
            (fn(m(x), y.double()) / 4).backward()

    return run(m, fn, passes)


@loop("biased", STALE)
def zeroed_before_step() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (ce(m(x), y) / 4).backward()
        for p in m.parameters():
            p.grad.zero_()

    return run(net(), None, passes)


@loop("biased", STALE)
def last_left() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            g = torch.autograd.grad(ce(m(x), y) / 4, list(m.parameters()))
        for p, v in zip(m.parameters(), g, strict=True):
            p.grad = v

    return run(net(), None, passes)


@loop("sound")
def autograd_grad_sum() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            g = torch.autograd.grad(ce(m(x), y) / 4, list(m.parameters()))
            for p, v in zip(m.parameters(), g, strict=True):
                p.grad = v if p.grad is None else p.grad + v

    return run(net(), None, passes)


@loop("biased", STALE)
def replaced() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (ce(m(x), y) / 4).backward()
        torch.manual_seed(9)
        for p in m.parameters():
            p.grad = torch.randn_like(p) * p.grad.norm()

    return run(net(), None, passes)


@loop("biased", UNEQUAL)
def nan_empty() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        ds = data()
        ds[2][1][:] = -100
        for x, y in ds:
            (ce(m(x), y) / 4).backward()

    return run(net(), None, passes)


@loop("biased", UNEQUAL)
def empty_counts_one() -> Any:
    def fn(z: Any, y: Any) -> Tensor:
        k = y >= 0
        return ce(z, y, reduction="sum") / max(1, int(k.sum()))

    def passes(m: nn.Module, o: Any) -> None:
        ds = data()
        ds[2][1][:] = -100
        for x, y in ds:
            (fn(m(x), y) / 4).backward()

    return run(net(), fn, passes)


@loop("sound")
def empty_divided_by_three() -> Any:
    def fn(z: Any, y: Any) -> Tensor:
        k = y >= 0
        return ce(z, y, reduction="sum") / max(1, int(k.sum()))

    def passes(m: nn.Module, o: Any) -> None:
        ds = data()
        ds[2][1][:] = -100
        for x, y in ds:
            (fn(m(x), y) / 3).backward()

    return run(net(), fn, passes)


@loop("inconclusive", COUPLED)
def cached_features() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        ds = data()
        with torch.no_grad():
            fs = [m(x) for x, _ in ds]
        labels = torch.cat([y for _, y in ds])
        for k, (x, _y) in enumerate(ds):
            f = list(fs)
            f[k] = m(x)
            z = torch.cat(f)
            z = F.normalize(z, dim=-1)
            ce(z @ z.T / 0.1 - 1e9 * torch.eye(16, dtype=D), labels).backward()

    return run(net(), None, passes)


@loop("sound")
def gan_disc_with_gen_passes() -> Any:
    gen = nn.Linear(4, 5).double()
    dis = net(1)
    og = torch.optim.SGD(gen.parameters(), 0.1)
    b = nn.BCEWithLogitsLoss()
    one, zero = torch.ones(4, 1, dtype=D), torch.zeros(4, 1, dtype=D)

    def passes(m: nn.Module, o: Any) -> None:
        for _ in range(3):
            (b(dis(gen(torch.randn(4, 4, dtype=D))), one) / 3).backward()
        og.step()
        o.zero_grad()
        for x, _y in data((4, 4, 4)):
            fake = gen(torch.randn(4, 4, dtype=D)).detach()
            ((b(dis(x), one) + b(dis(fake), zero)) / 2 / 3).backward()

    return run(dis, b, passes)


@loop("sound")
def kl_batchmean() -> Any:
    def fn(s: Any, t: Any) -> Tensor:
        return F.kl_div(s.log_softmax(-1), t, reduction="batchmean")

    def passes(m: nn.Module, o: Any) -> None:
        for x, _y in data():
            (fn(m(x), torch.rand(4, 3, dtype=D).softmax(-1)) / 4).backward()

    return run(net(), fn, passes)


@loop("sound")
def vae_like() -> Any:
    def fn(model: Any, x: Any) -> Tensor:
        z = model(x)
        mu, lv = z[:, :2], z[:, 2:3]
        return (
            F.mse_loss(mu, x[:, :2], reduction="sum") / x.shape[0]
            - 0.5 * (1 + lv - mu[:, :1] ** 2 - lv.exp()).sum() / x.shape[0]
        )

    def passes(m: nn.Module, o: Any) -> None:
        for x, _y in data():
            (fn(m, x) / 4).backward()

    return run(net(), fn, passes)


@loop("biased", UNEQUAL)
def vae_like_unequal() -> Any:
    def fn(model: Any, x: Any) -> Tensor:
        z = model(x)
        mu, lv = z[:, :2], z[:, 2:3]
        return (
            F.mse_loss(mu, x[:, :2], reduction="sum") / x.shape[0]
            - 0.5 * (1 + lv - mu[:, :1] ** 2 - lv.exp()).sum() / x.shape[0]
        )

    def passes(m: nn.Module, o: Any) -> None:
        for x, _y in data((4, 4, 4, 2)):
            (fn(m, x) / 4).backward()

    return run(net(), fn, passes)


@loop("sound")
def uncertainty_weights() -> Any:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = net()
            self.s = nn.Parameter(torch.tensor([0.3, 0.2], dtype=D))

        def forward(self, x):
            return self.n(x)

    m = M()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x)
            a, b = ce(z, y), (z**2).mean()
            ((torch.exp(-m.s[0]) * a + m.s[0] + torch.exp(-m.s[1]) * b + m.s[1]) / 4).backward()

    return run(m, None, passes)


@loop("sound")
def uncertainty_weights_fn() -> Any:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = net()
            self.s = nn.Parameter(torch.tensor([0.3, 0.2], dtype=D))

        def forward(self, x):
            return self.n(x)

    def fn(m: Any, x: Any, y: Any) -> Tensor:
        z = m(x)
        a, b = ce(z, y), (z**2).mean()
        return torch.exp(-m.s[0]) * a + m.s[0] + torch.exp(-m.s[1]) * b + m.s[1]

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (fn(m, x, y) / 4).backward()

    return run(M(), fn, passes)


@loop("sound")
def model_loss_dict() -> Any:
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = net()

        def forward(self, x, y):
            z = self.n(x)
            return {"a": ce(z, y), "b": (z**2).mean()}

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (sum(m(x, y).values()) / 4).backward()

    return run(M(), None, passes)


@loop("biased", SCALE)
def partial_divided_by_full() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4, 4, 4)):
            (ce(m(x), y) / 4).backward()

    return run(net(), None, passes)


@loop("sound")
def given_constant_fn() -> Any:
    lam = 0.3

    def fn(model: Any, x: Any, y: Any) -> Tensor:
        return lam * ce(model(x), y)

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (fn(m, x, y) / 4).backward()

    return run(net(), fn, passes)


@loop("sound")
def clip_sym() -> Any:
    def fn(a: Any, y: Any) -> Tensor:
        return (ce(a, y) + ce(a * 2, y)) / 2

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4, 4)):
            (fn(m(x), y) / 2).backward()

    return run(net(), fn, passes)


@loop("sound")
def one_micro_batch() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data((4,)):
            ce(m(x), y).backward()

    return run(net(), None, passes)


@loop("sound")
def aux_var_weight() -> Any:
    lam = 0.1

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x)
            ((ce(z, y) + lam * (z**2).mean()) / 4).backward()

    return run(net(), None, passes)


@loop("biased", SCALE)
def aux_not_divided() -> Any:
    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            z = m(x)
            (ce(z, y) / 4 + 0.1 * (z**2).mean()).backward()

    return run(net(), None, passes)


@loop("sound")
def penalty_first() -> Any:
    c = nn.CrossEntropyLoss()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            loss = 0.01 * m[0].weight.pow(2).sum()
            ((loss + c(m(x), y)) / 4).backward()

    return run(net(), c, passes)


@loop("sound")
def penalty_once_own_backward() -> Any:
    c = nn.CrossEntropyLoss()

    def passes(m: nn.Module, o: Any) -> None:
        for x, y in data():
            (c(m(x), y) / 4).backward()
        (0.01 * m[0].weight.abs().sum()).backward()

    return run(net(), c, passes)


@loop("sound")
def grad_scaler() -> Any:
    m = net().float()
    sc = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = torch.optim.SGD(m.parameters(), 0.1)
    with watch(m, None, opt) as a:
        for x, y in data((4, 4, 4)):
            sc.scale(ce(m(x.float()), y) / 3).backward()
        sc.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        sc.step(opt)
        sc.update()
    return a


@loop("sound")
def token_mean_float32() -> Any:
    m = net().float()

    def passes(m: nn.Module, o: Any) -> None:
        ds = data((4, 4, 4))
        ds[0][1][:2] = -100
        n = sum(int((y >= 0).sum()) for _, y in ds)
        for x, y in ds:
            (ce(m(x.float()), y) * (y >= 0).sum() / n).backward()

    return run(m, None, passes)


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_is_judged_with_its_cause(name: str) -> None:
    """By verdict, and by cause where there is one."""
    run_it, verdict, cause = LOOPS[name]
    audit = run_it()
    assert audit.verdict in (SOUND if verdict == "sound" else (verdict,)), str(audit)
    assert audit.cause == cause, str(audit)
