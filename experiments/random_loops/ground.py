"""What a random loop runs on, and what its window's large batch would give: by autograd, in float64."""

import linecache
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.random_loops.plan import Plan
from experiments.random_loops.source import text_of
from experiments.random_loops.terms import CLASS_WEIGHTS, drawn_target

FEATURES, HIDDEN = 5, 6
Gradients = dict[str, Tensor]


class RunningMean(nn.Module):
    """Subtracts a running mean of its inputs, which every forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, features) to the same."""
        result = x - self.mean
        self.mean.lerp_(x.detach().mean(0), 0.5)
        return result


class Frozen(nn.BatchNorm1d):
    """Batch normalisation by the statistics that it has, as detectors freeze it."""

    def train(self, mode: bool = True) -> "Frozen":
        """Stay as it is."""
        return super().train(False)


class Net(nn.Module):
    """A trunk, and a head for each term of the loss."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        few = plan.middle == "few"
        middles = {"layer norm": nn.LayerNorm, "batch norm": nn.BatchNorm1d}
        middle = middles[plan.middle](HIDDEN) if plan.middle in middles else nn.Identity()
        if plan.middle == "running mean":
            middle = RunningMean()
        if plan.middle == "frozen batch norm" and not plan.tokens:
            middle = Frozen(HIDDEN).eval()
        trunk = [nn.Linear(FEATURES, HIDDEN), middle, nn.Tanh()]
        self.trunk = nn.Identity() if few else nn.Sequential(*trunk)
        width = features_of(plan) if few else HIDDEN
        self.heads = nn.ModuleList([nn.Linear(width, plan.width(term)) for term in plan.terms])

    def forward(self, x: Tensor) -> Any:
        """Map (batch, [tokens,] features) to one output, or a tuple of one for each term."""
        hidden = self.trunk(x)
        outputs = tuple(head(hidden) for head in self.heads)
        return outputs if len(outputs) > 1 else outputs[0]


def features_of(plan: Plan) -> int:
    """Return the width of a sample."""
    return 2 if plan.middle == "few" else FEATURES


def window_of(plan: Plan) -> list[dict[str, Tensor]]:
    """Return the micro-batches, in float64: `x`, `u` for a second call, and each term's target."""
    draw = torch.Generator().manual_seed(plan.seed)
    window = []
    for index, size in enumerate(plan.sizes):
        micro_batch: dict[str, Tensor] = {}
        shapes = [
            (n, plan.tokens) if plan.tokens else (n,) for n in (size, *plan.further[index : index + 1])
        ]
        for name, shape in zip("xu", shapes, strict=False):
            micro_batch[name] = torch.randn(
                *shape, features_of(plan), generator=draw, dtype=torch.float64
            )
        for term in plan.terms:
            how = plan.kept(term, index), plan.width(term), draw
            micro_batch |= drawn_target(term, shapes[term.call], *how)
        window.append(micro_batch)
    return window


@dataclass
class Ground:
    """A plan's loop, ready to be run once."""

    plan: Plan
    net: Net
    model: nn.Module
    """What the loop calls: the net, or a module around it that computes the loss."""
    teacher: Net
    window: list[dict[str, Tensor]]
    names: dict[str, Any]
    """The loop's own names, `train` among them."""
    optimizer: torch.optim.Optimizer

    @property
    def watched(self) -> Any:
        """What `watch` is given as the criterion."""
        plan, names = self.plan, self.names
        if plan.form == "functions":
            return eval(plan.terms[0].of.call, names) if plan.told else None
        own = plan.terms[0].of.call if plan.form == "own" else "criterion"
        return (
            None
            if plan.form == "model"
            else names["compute_loss" if plan.form == "compute_loss" else own]
        )

    def run(self) -> None:
        """Run the loop: one window, or two where gradients are left from the first."""
        times = 2 if self.plan.fault == "never zeroed" else 1
        for _ in range(times):
            self.names["train"](self.model, self.optimizer, self.window)


def ground(plan: Plan) -> Ground:
    """Return new models, data and optimizer, the same every time."""
    dtype = torch.float32 if plan.single else torch.float64
    torch.manual_seed(plan.seed)
    net, teacher = Net(plan).to(dtype), Net(plan).to(dtype)
    window = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in m.items()} for m in window_of(plan)
    ]
    names: dict[str, Any] = {
        "F": F,
        "nn": nn,
        "torch": torch,
        "N": plan.accum_steps,
        "DTYPE": dtype,
        "MOST": 0.05,
        "WEIGHT": torch.tensor(CLASS_WEIGHTS, dtype=dtype),
        "teacher": teacher.requires_grad_(False),
    }
    text = text_of(plan)
    file = f"<random loop {plan.seed} {plan.fault or 'sound'}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), names)
    model = names["WithLoss"](net) if plan.form == "model" else net
    return Ground(plan, net, model, teacher, window, names, torch.optim.SGD(net.parameters(), lr=0.1))


def large_batch(plan: Plan) -> Gradients:
    """Return the gradient of all samples in one pass, each term by hand over all that counts."""
    built = ground(replace(plan, single=False))
    # `built` is not run: these are the weights and the state at the window's start.
    data = {key: torch.cat([m[key] for m in built.window]) for key in built.window[0]}
    calls = [data["x"], data["u"]] if plan.further else [data["x"]]
    outputs = [listed(built.net(x)) for x in calls]
    loss = torch.zeros((), dtype=torch.float64)
    for term in plan.terms:
        out = outputs[term.call][term.head]
        with torch.no_grad():
            taught = listed(built.teacher(calls[term.call]))[term.head]
        target = taught if term.kind == "teacher" else data[term.name]
        keep = data.get(f"{term.name}_keep", torch.ones(()))
        total, count = term.of.by_hand(out, target, keep)
        loss = loss + term.weight * (total if term.summed else total / count)
    if plan.fault == "a term couples samples":
        out = outputs[0][0]
        loss = loss + 0.5 * (out - out.mean(0)).square().mean()
    loss.backward()
    return gradients(built.net)


def listed(outputs: Any) -> list[Tensor]:
    """Return a model's outputs, one for each term."""
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def stepped_with(plan: Plan) -> Gradients:
    """Run the loop in float64, unwatched; return the gradient of its last optimizer step."""
    built = ground(replace(plan, single=False))
    kept: Gradients = {}
    if plan.fault == "never zeroed":  # the second window's own: at the first one's weights
        built.optimizer.param_groups[0]["lr"] = 0.0
    built.optimizer.register_step_pre_hook(lambda *_: kept.update(gradients(built.net)))
    built.run()
    return kept


def gradients(net: nn.Module) -> Gradients:
    """Return copies of all gradients, zero where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in net.named_parameters()
    }


def relative(found: Gradients, expected: Gradients) -> tuple[float, float]:
    """Return c, and ‖found − c·expected‖ / ‖c·expected‖ at the best c."""
    a, b = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    c = float(a @ b / (b @ b))
    return c, float((a - c * b).norm() / (abs(c) * b.norm())) if c else float("inf")
