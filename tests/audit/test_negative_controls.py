"""Each planted fault is a fault, each sound loop is sound, and `watch` tells them apart.

The first half measures the loops without `watch`: what reaches each optimizer step against the large
batch's gradient in float64, and schedule, graphs and reported losses against what they should be.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import gaccum_exp
from experiments.negative_controls.control import Built, Control, Ground, Loop, Measure, run
from experiments.negative_controls.controls import CONTROLS, PAIRS
from experiments.negative_controls.judge import accused, caught
from gaccum_exp.audit.result import CAUSES, Check

CLEARLY_WRONG = 1e-3
CHECKS = {"schedule", "memory", "reported loss"}
FAULTY = tuple(control for control in CONTROLS if control.faulty)
RUNS = [
    pytest.param(control, faulty, id=f"{control.slug}-{'faulty' if faulty else 'sound'}")
    for control in CONTROLS
    for faulty in ((True, False) if control.faulty else (False,))
]


def by_slug(controls: tuple[Control, ...]) -> list[Any]:
    return [pytest.param(control, id=control.slug) for control in controls]


@dataclass
class Step:
    """What was there when the optimizer took a gradient."""

    weights: dict[str, Tensor]
    gradient: dict[str, Tensor]
    rates: list[float]
    graphs_made: int
    """Passes with a graph since the last step."""
    graphs_alive: int
    """Those of them that something still holds."""


@dataclass
class Recorder:
    """Looks on while a loop runs; knows nothing of `watch`."""

    built: Built
    steps: list[list[Step]] = field(default_factory=list)
    """For each optimizer step the gradients it took: one, or as many as it called its closure."""
    graphs: "list[weakref.ref[Any]]" = field(default_factory=list)

    @contextmanager
    def looking(self) -> Iterator[None]:
        handles = [
            self.built.model.register_forward_hook(self.after_forward),
            self.built.optimizer.register_step_pre_hook(self.before_step),
        ]
        yield
        for handle in handles:
            handle.remove()

    def after_forward(self, _model: nn.Module, _args: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn]
        if tensors:
            held_by_graph = nn.Identity()
            tensors[0].grad_fn.metadata["held"] = held_by_graph
            self.graphs.append(weakref.ref(held_by_graph))

    def before_step(self, _optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # LBFGS is handed itself among the arguments as all optimizers are, and a closure after it
        self.steps.append([])
        closures = [argument for argument in args if callable(argument)]
        if not closures:
            self.note()
            return None
        (closure,) = closures
        return tuple(self.noting(a) if a is closure else a for a in args), kwargs

    def noting(self, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def noted() -> Tensor:
            with torch.enable_grad():
                loss = closure()
            self.note()
            return loss

        return noted

    def note(self) -> None:
        trained = {n: p for n, p in self.built.model.named_parameters() if p.requires_grad}
        gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        self.steps[-1].append(
            Step(
                weights=copy.deepcopy(self.built.model.state_dict()),
                gradient={n: to_float64(g.detach().clone()) for n, g in gradient.items()},
                rates=[group["lr"] for group in self.built.optimizer.param_groups],
                graphs_made=len(self.graphs),
                graphs_alive=sum(graph() is not None for graph in self.graphs),
            )
        )
        self.graphs = []


def measured(loop: Loop, ground: Ground) -> dict[Measure, float]:
    """Run the loop; return how far it is from what it should be, in each respect."""
    built = ground.build()
    recorder = Recorder(built)
    initial_rates = [group["lr"] for group in built.optimizer.param_groups]
    with recorder.looking():
        reported = run(loop, built)
    windows = ground.windows()
    far: dict[Measure, float] = dict.fromkeys(("gradient", "schedule", "memory", "reported loss"), 0.0)
    if len(recorder.steps) != len(windows):
        return far | {"gradient": float("inf")}
    for k, (window, steps) in enumerate(zip(windows, recorder.steps, strict=True)):
        for step in steps:
            expected, loss = large_batch(ground, step.weights, window)
            rates = [rate * ground.rates(k, len(windows)) for rate in initial_rates]
            saved = step.graphs_made / len(window)
            now: dict[Measure, float] = {
                "gradient": relative(step.gradient, expected),
                "schedule": max(
                    abs(a - b) / first
                    for a, b, first in zip(step.rates, rates, initial_rates, strict=True)
                ),
                "memory": step.graphs_alive / saved - 1 if saved else 0.0,
                "reported loss": abs(reported[k] - loss) / loss if reported else 0.0,
            }
            far = {name: max(far[name], now[name]) for name in far}
    return far


def large_batch(
    ground: Ground, weights: dict[str, Tensor], window: list[Any]
) -> tuple[dict[str, Tensor], float]:
    """Return gradient and loss of the window in one pass, in float64."""
    model = ground.build().model
    model._apply(to_float64)
    model.load_state_dict(weights)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = ground.large_batch(model, tree_map(to_float64, window))
    loss.backward()
    ground.before_step(list(trained.values()))
    return {name: p.grad for name, p in trained.items()}, loss.item()  # type: ignore[misc]  # backward set it


def to_float64(leaf: Tensor) -> Tensor:
    if leaf.is_complex():
        return leaf.to(torch.complex128)
    return leaf.double() if leaf.is_floating_point() else leaf


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g[name].flatten() + 0j for name in expected]) for g in (found, expected))
    return float((a - b).norm() / b.norm())


def limits(ground: Ground) -> dict[Measure, float]:
    return {
        "gradient": ground.rounding,
        "schedule": 1e-12,
        "memory": 0.0,
        "reported loss": ground.rounding,
    }


@pytest.mark.parametrize("control", by_slug(FAULTY))
def test_a_planted_fault_is_far_from_the_large_batch_and_the_only_one(control: Control) -> None:
    """By more than a thousandth, and ten times what the loop's precision explains; in nothing else.

    So that what is found in the loop is the fault that was to be found.
    """
    assert control.faulty
    found, allowed = measured(control.faulty, control.ground), limits(control.ground)
    assert found[control.wrong] > max(CLEARLY_WRONG, 10 * allowed[control.wrong]), found
    assert {n: v for n, v in found.items() if v > allowed[n]}.keys() == {control.wrong}


@pytest.mark.parametrize("control", by_slug(CONTROLS))
def test_a_sound_loop_steps_with_the_large_batchs_gradient(control: Control) -> None:
    """And on schedule, with one micro-batch's graph alive, and the window's loss reported."""
    found, allowed = measured(control.sound, control.sound_ground), limits(control.sound_ground)
    assert {n: v for n, v in found.items() if v > allowed[n]} == {}


def test_the_registry_is_complete() -> None:
    """Every slug once, every expectation a cause or a check, every fault with its kind of check."""
    slugs = [control.slug for control in CONTROLS]
    assert sorted(set(slugs)) == sorted(slugs)
    for control in FAULTY:
        assert control.expected in {*CAUSES, *CHECKS}, control.slug
        assert (control.wrong == "gradient") == (control.expected in CAUSES), control.slug


def remains(loop: Loop, ground: Ground, watch: bool) -> tuple[list[Any], Any]:
    """Run the loop; return all that is left of it, and its audit where it is watched."""
    built = ground.build()
    watched: Any = gaccum_exp.watch(*built[:3]) if watch else nullcontext()
    with watched as audit:
        reported = run(loop, built)
    left = [
        dict(built.model.named_parameters()),
        dict(built.model.named_buffers()),
        [p.grad for p in built.model.parameters()],
        built.optimizer.state_dict(),
        torch.get_rng_state(),
        reported,
    ]
    return left, audit


def same(a: Any, b: Any) -> bool:
    """Compare bit for bit."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@dataclass
class Said:
    """What an audit may say, as far as it is judged by."""

    verdict: str = "equivalent"
    cause: str | None = None
    remedy: str | None = None
    checks: tuple[Check, ...] = ()
    sound: bool = False


def test_only_the_right_words_count_as_caught() -> None:
    """A wrong cause, a remedy for something else, and silence are misses; a check is an accusation."""
    scale, memory = (
        next(control for control in PAIRS if control.slug == slug)
        for slug in ("not_divided", "backward_once")
    )
    check = Check("memory", "call backward for each micro-batch")
    assert caught(scale, Said("biased", "loss scale", "the loss is not divided by N"))
    assert not caught(scale, Said("biased", "randomness", "the loss is not divided by N"))
    assert not caught(scale, Said("biased", "loss scale", "divide by something"))
    assert not caught(scale, Said(checks=(check,)))
    assert not caught(scale, Said(sound=True))
    assert caught(memory, Said(checks=(check,)))
    assert not caught(memory, Said(checks=(Check("schedule", check.finding),)))
    assert not accused(scale, Said())
    assert accused(scale, Said("stochastic"))
    assert accused(scale, Said("identical", checks=(check,)))


@pytest.mark.parametrize(("control", "faulty"), RUNS)
def test_watch_judges_a_loop_and_leaves_it_as_it_was(control: Control, faulty: bool) -> None:
    """A planted fault by its cause, or by the check that is there for it, with what to do about it.

    A sound loop is accused of nothing: gradient, schedule, memory, reported loss. Both end
    as they do without `watch`: weights, buffers, gradients, optimizer state, random state and reported
    losses, bit for bit. (A loop that differed by itself would show nothing, so it runs twice.)
    """
    loop, ground = (control.faulty, control.ground) if faulty else (control.sound, control.sound_ground)
    assert loop
    (once, _), (again, _) = (remains(loop, ground, watch=False) for _ in range(2))
    assert same(once, again)
    left, audit = remains(loop, ground, watch=True)
    assert same(left, once)
    right = caught(control, audit) if faulty else not accused(control, audit)
    assert right, (audit.verdict, audit.cause, audit.remedy, audit.checks)
