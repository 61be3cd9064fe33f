"""`watch` and the callback around Lightning's Trainer."""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import watch
from tests.audit.support import Gradients, gradients, large_batch, relative
from tests.integrations.small import EQUAL, PARTIAL, SHORT, adamw, loader, net, points, same, weights

lightning = pytest.importorskip("lightning", reason="the extra `peers` is not installed")
torchmetrics = pytest.importorskip("torchmetrics")
integration = pytest.importorskip("gaccum_exp.integrations.lightning")

pytestmark = [  # Lightning's own, about torch and about its own advice
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Lit(lightning.LightningModule):
    """Logs its loss and an accuracy, and calls a part of itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = net()
        self.drop = nn.Dropout(dropout)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3)
        self.optimizer = adamw(self)
        self.reached: list[Gradients] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.reached.append(gradients(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(self.drop(x))
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer


class WithForward(Lit):
    """Calls itself, and a criterion that is a module."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def fit(
    folder: Path,
    model: Any,
    sizes: Sequence[int],
    callbacks: Any = (),
    criterion: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Any:
    """Train one epoch with N = 4, under `watch` where a criterion is given; return trainer and audit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        **{"max_epochs": 1, "accumulate_grad_batches": 4, "gradient_clip_val": 0.05} | settings,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    given = None if criterion is None else criterion(model)
    with watch(model, given, model.optimizer) if criterion is not None else nullcontext() as audit:
        trainer.fit(model, loader(sizes))
    return trainer, audit


def training_step(model: Any) -> Any:
    return model.training_step


def whatever_it_calls(model: Any) -> Any:
    return None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("kind", "criterion"),
    [(Lit, training_step), (WithForward, training_step), (WithForward, whatever_it_calls)],
)
def test_equal_micro_batches_of_a_trainer_are_equivalent(
    tmp_path: Path, kind: Any, criterion: Any, precision: str
) -> None:
    """`fit` as a whole inside the block, clipped, with a batch index and a log that is not replayed."""
    _, audit = fit(tmp_path, kind(), EQUAL, criterion=criterion, precision=precision)
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("equivalent", 4)] * 2, str(audit)
    assert audit.sound


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_short_last_micro_batch_of_a_trainer_is_biased(tmp_path: Path, precision: str) -> None:
    """Lightning divides each mean by N."""
    _, audit = fit(tmp_path, Lit(), SHORT, criterion=training_step, precision=precision)
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators"), str(audit)


def test_a_partial_last_window_of_a_trainer_has_the_wrong_size(tmp_path: Path) -> None:
    """Lightning steps at the epoch's end, on two micro-batches that were divided by four."""
    _, audit = fit(tmp_path, Lit(), PARTIAL, criterion=training_step)
    assert [w.verdict for w in audit.windows] == ["equivalent", "biased"], str(audit)
    assert (audit.cause, audit.accum_steps) == ("loss scale", 2)
    assert audit.scale == pytest.approx(0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trainer_ends_bit_for_bit_as_without_watch(tmp_path: Path, dropout: float) -> None:
    """Weights, logged numbers and random state; with dropout too."""
    ends = []
    for criterion in (None, training_step):
        model = Lit(dropout)
        trainer, audit = fit(tmp_path, model, [*SHORT, *EQUAL[:4]], criterion=criterion)
        ends.append((weights(model), dict(trainer.callback_metrics), torch.get_rng_state()))
    assert len(audit.windows) == 2
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert ends[0][1].keys() == {"loss", "accuracy"}
    assert torch.equal(ends[0][2], ends[1][2])


@pytest.mark.parametrize("kind", [Lit, WithForward])
def test_the_callback_judges_the_windows_that_are_due(tmp_path: Path, kind: Any) -> None:
    """Every second of four, each with its four micro-batches."""
    audit = integration.AuditCallback(every_n_steps=2)
    fit(tmp_path, kind(), [4] * 16, [audit])
    found = [(step, a.verdict, a.accum_steps) for step, a in audit.audits]
    assert found == [(0, "equivalent", 4), (2, "equivalent", 4)]


def test_the_callback_judges_every_partial_window_and_counts_the_biased(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However seldom windows are due; the last line of the training says where to look."""
    audit = integration.AuditCallback(every_n_steps=1000)
    with pytest.warns(UserWarning, match="each divided by 4"):
        fit(tmp_path, Lit(), PARTIAL, [audit], max_epochs=2)
    assert [(step, a.verdict) for step, a in audit.audits] == [
        (0, "equivalent"), (1, "biased"), (3, "biased")
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == (
        "gradient accumulation: of the windows judged 1 equivalent, 2 biased; see .audits of those "
        "after 1, 3 optimizer steps"
    )


def test_the_callback_says_in_a_line_that_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of the training; no window is short, and none but the first is due."""
    fit(tmp_path, Lit(), EQUAL, [integration.AuditCallback()])
    said = capsys.readouterr().out.splitlines()
    assert said[-1:] == ["gradient accumulation: of the windows judged 1 equivalent"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_callback_leaves_the_training_bit_for_bit_as_it_was(tmp_path: Path, dropout: float) -> None:
    """Weights, logged numbers and random state after two epochs; nothing stays attached."""
    ends = []
    for callbacks in ([], [integration.AuditCallback(every_n_steps=1)]):
        model = Lit(dropout)
        trainer, _ = fit(tmp_path, model, EQUAL, callbacks, max_epochs=2)
        ends.append((weights(model), dict(trainer.callback_metrics), torch.get_rng_state()))
        assert not model._forward_hooks
        assert sys.getprofile() is None
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert torch.equal(ends[0][2], ends[1][2])
    assert [step for step, _ in callbacks[0].audits] == [0, 1, 2, 3]


def test_the_callback_warns_of_a_bias_once_per_cause(tmp_path: Path) -> None:
    """Two epochs that end in a partial window: two audits that are biased, one warning."""
    audit = integration.AuditCallback(every_n_steps=1)
    with pytest.warns(UserWarning, match="each divided by 4") as said:
        fit(tmp_path, Lit(), PARTIAL, [audit], max_epochs=2)
    verdicts = [a.verdict for _, a in audit.audits]
    assert verdicts == ["equivalent", "biased", "equivalent", "biased"]
    assert len([w for w in said if "each divided by 4" in str(w.message)]) == 1


def test_the_callback_lets_go_of_a_training_that_fails(tmp_path: Path) -> None:
    """In the middle of a window: no hook and no profiler stays behind."""

    class Failing(Lit):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    model = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, model, EQUAL, [integration.AuditCallback()])
    assert sys.getprofile() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


class Named(Lit):
    """A step whose second argument has another name."""

    def training_step(self, batch: Any, _: int) -> Any:  # type: ignore[override]  # as Lightning allows
        return super().training_step(batch, _)


class Starred(Lit):
    def training_step(self, *args: Any) -> Any:
        return super().training_step(*args)


class WithoutIndex(Lit):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]  # as Lightning allows
        return super().training_step(batch, 0)


class Dictionary(Lit):
    """Returns more than its loss, and logs in all ways."""

    def training_step(self, batch: Any, batch_nb: int) -> Any:  # type: ignore[override]  # as above
        loss = super().training_step(batch, batch_nb)
        self.log_dict({"twice": 2 * loss.detach(), "number": loss.item()})
        return {"loss": loss, "logs": {"loss": loss.detach()}, "inputs": batch[0]}


class Skipping(Lit):
    """Leaves every fourth batch out, as for a bad sample."""

    def training_step(self, batch: Any, i: int) -> Any:  # type: ignore[override]  # as above
        return None if i % 4 == 1 else super().training_step(batch, i)


class Manual(Lit):
    """Divides, back-propagates and steps itself."""

    divisor = 4.0

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, i: int) -> None:  # type: ignore[override]  # as above
        loss = super().training_step(batch, i)
        self.manual_backward(loss / self.divisor)
        if (i + 1) % 4 == 0:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
            optimizer.step()
            optimizer.zero_grad()


class ManualUndivided(Manual):
    divisor = 1.0


class ManualTwo(Manual):
    """Two models in turns, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.second = net()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.second)]

    def training_step(self, batch: Any, i: int) -> None:  # type: ignore[override]  # as above
        for part, optimizer in zip((self.net, self.second), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(F.cross_entropy(part(batch[0]), batch[1]))
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


def first_gap(model: Any, large: Callable[[Any], Tensor], run: Callable[[], object]) -> float:
    """Run a training; return how far its first gradient is off the large batch's, in float64."""
    expected = large_batch(model, large)
    run()
    return relative(model.reached[0], expected)


def cross_entropy(model: Any, samples: int = 32) -> Tensor:
    x, y = points(samples)
    return F.cross_entropy(model.net(x.double()), y)


@pytest.mark.parametrize("kind", [Named, Starred, WithoutIndex, Dictionary])
def test_a_training_step_with_any_arguments_and_returns_is_judged(tmp_path: Path, kind: Any) -> None:
    """And the audit prints as its report."""
    audit, model = integration.AuditCallback(every_n_steps=1), kind()
    assert first_gap(model, cross_entropy, lambda: fit(tmp_path, model, EQUAL, [audit])) < 1e-5
    assert [(a.verdict, a.accum_steps) for _, a in audit.audits] == [("equivalent", 4)] * 2, audit.audits
    assert str(audit.audits[0][1]).startswith("equivalent (N = 4, mean): off by ")


class DividedTwice(Lit):
    """Divides by N, and so does Lightning (roboflow/rf-detr#1503)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1]) / self.trainer.accumulate_grad_batches

    @staticmethod
    def large_batch(model: Any, samples: int) -> Tensor:
        return cross_entropy(model, samples)


class DividedTwiceByANumber(DividedTwice):
    """In a function of its own, of a dictionary that it returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.multi_margin_loss(self.net(batch[0]), batch[1]) / 3
        return {"loss": loss, "of": batch_idx}

    @staticmethod
    def large_batch(model: Any, samples: int) -> Tensor:
        x, y = points(samples)
        return F.multi_margin_loss(model.net(x.double()), y)


class DividedTwiceWithAPenalty(DividedTwice):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.large(self.net(batch[0]), batch[1]) / 4

    @staticmethod
    def large(out: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(out, labels) + 0.1 * out.square().mean()

    @staticmethod
    def large_batch(model: Any, samples: int) -> Tensor:
        x, y = points(samples)
        return DividedTwiceWithAPenalty.large(model.net(x.double()), y)


@pytest.mark.parametrize(
    ("kind", "n"), [(DividedTwice, 4), (DividedTwiceByANumber, 3), (DividedTwiceWithAPenalty, 4)]
)
def test_a_training_step_that_divides_by_n_itself_is_told_so(tmp_path: Path, kind: Any, n: int) -> None:
    """What reaches the optimizer is 1 / N of the large batch's gradient, and that is what is printed."""
    audit, model = integration.AuditCallback(every_n_steps=1), kind()
    settings: Any = {"accumulate_grad_batches": n, "gradient_clip_val": None}

    def train() -> None:
        with pytest.warns(UserWarning, match="twice"):
            fit(tmp_path, model, EQUAL[:n], [audit], **settings)

    gap = first_gap(model, lambda m: kind.large_batch(m, 8 * n), train)
    assert gap == pytest.approx(1 - 1 / n, rel=1e-5)
    ((_, found),) = audit.audits
    assert (found.verdict, found.cause, found.accum_steps) == ("biased", "loss scale", n), str(found)
    assert found.e64 == pytest.approx(gap, rel=1e-5)
    assert str(found) == found.report()
    assert f"in float64: {found.e64:.2g};" in str(found), str(found)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_nothing_leaves_a_window_too_small(tmp_path: Path) -> None:
    """Lightning divides by four what three micro-batches gave."""
    audit = integration.AuditCallback(every_n_steps=1)
    with pytest.warns(UserWarning, match="3 micro-batches"):
        fit(tmp_path, Skipping(), EQUAL, [audit])
    found = {(a.verdict, a.cause, a.accum_steps) for _, a in audit.audits}
    assert found == {("biased", "loss scale", 3)}


@pytest.mark.parametrize(("kind", "scale"), [(Manual, 1), (ManualUndivided, 4)])
def test_manual_optimization_is_judged(tmp_path: Path, kind: Any, scale: int) -> None:
    """By the loss of torch that the step calls on a part of the module; clipped by Lightning."""
    audit = integration.AuditCallback(every_n_steps=1)
    settings: Any = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    with pytest.warns(UserWarning, match="not divided") if scale > 1 else nullcontext():
        fit(tmp_path, kind(), EQUAL, [audit], **settings)
    found = [(a.accum_steps, a.scale, a.verdict == "equivalent") for _, a in audit.audits]
    assert found == [(4, pytest.approx(scale), scale == 1)] * 2, audit.audits


def test_several_optimizers_in_turns_are_each_judged(tmp_path: Path) -> None:
    """Toggled, clipped one by one, and stepped after each pass of their own."""
    audit = integration.AuditCallback(every_n_steps=1)
    settings: Any = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    fit(tmp_path, ManualTwo(), EQUAL[:2], [audit], **settings)
    found = [(a.verdict in ("equivalent", "identical"), a.accum_steps) for _, a in audit.audits]
    assert found == [(True, 1)] * 4, audit.audits


def test_a_callback_that_is_never_due_is_an_error() -> None:
    """Said with the number, before anything runs."""
    with pytest.raises(ValueError, match="every_n_steps=0"):
        integration.AuditCallback(every_n_steps=0)


def test_the_callback_judges_nothing_on_several_processes_and_says_so_once() -> None:
    """A rank sees its own micro-batches only, and a gradient of all ranks'."""
    audit = integration.AuditCallback()
    ranks = SimpleNamespace(
        world_size=2, global_step=0, optimizers=[None], accumulate_grad_batches=4, num_training_batches=8
    )
    with pytest.warns(UserWarning, match="one process only"):
        audit.on_train_batch_start(ranks, Lit(), None, 0)
    audit.on_train_batch_start(ranks, Lit(), None, 1)  # a second warning would be an error
    assert sys.getprofile() is None
