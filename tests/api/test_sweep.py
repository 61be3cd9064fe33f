"""A sweep from Python is the command line's: objects in place of targets, and values as its result."""

import csv
import functools
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gaccum_exp
from gaccum_exp import BadInputError, SweepResult, compare, sweep
from gaccum_exp.arms import child
from tests.program import Program, sweep_here

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, dtype=torch.float64, generator=GENERATOR)
Y = torch.randint(3, (12,), generator=GENERATOR)
STEPS = 3


@pytest.fixture(autouse=True)
def in_this_process(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run arms here: `test_a_notebook...` sees to what only processes show."""
    sweep_here(monkeypatch)
    monkeypatch.setattr(child, "start", lambda: None)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Return a module whose class no other process can import."""

    class Local(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    torch.manual_seed(1)
    return Local(4, 3).double().eval()


@pytest.fixture(scope="module")
def result(
    net: nn.Module, tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> Iterator[SweepResult]:
    """Sweep N over objects, once for all tests that look at it."""
    folder = tmp_path_factory.mktemp("from_python")
    with pytest.MonkeyPatch.context() as patch:
        sweep_here(patch)
        patch.setattr(child, "start", lambda: None)
        patch.chdir(folder)
        shutil.copyfile(empty_store, folder / "mlflow.db")
        yield sweep(
            "runtime.precision=fp64",
            model=net,
            criterion=nn.functional.cross_entropy,
            data=((X, Y), (X[:5], Y[:5])),
            optimizer=functools.partial(torch.optim.SGD, lr=0.5),
            accum_steps=[1, 5],
            global_batch_size=12,
            steps=STEPS,
            device="cpu",
        )


def test_objects_are_trained_as_a_loop_by_hand_trains_them(result: SweepResult, net: nn.Module) -> None:
    """From these weights, on these samples; and the module that was handed over has not moved."""
    torch.manual_seed(1)
    weight, bias = nn.Linear(4, 3).double().parameters()
    assert torch.equal(weight, net.weight)
    assert net.weight.grad is None
    assert not net.training
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy((X @ weight.T + bias).tanh(), Y)
        losses.append(loss.item())
        with torch.no_grad():
            for p, g in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
                p -= 0.5 * g
    table = result.table
    assert list(table.accum_steps) == [1, 5]
    assert list(table.train_loss) == pytest.approx([losses[-1]] * 2, rel=1e-12)
    assert table.max_loss_gap.max() < 1e-14
    assert list(result.verdicts.values()) == ["identical", "equivalent"]


def test_the_result_is_what_the_files_say(result: SweepResult) -> None:
    """The table is `comparison.csv`, words and figures are the page's, and no object is left behind."""
    with (result.folder / "comparison.csv").open() as file:
        head, *rows = csv.reader(file)
    table = result.table
    assert list(table.columns) == head
    said = [["" if v is None or v != v else str(v) for v in row] for row in table.astype(object).values]
    assert said == rows
    assert result.page == result.folder / "report.html"
    assert "N = 5 is equivalent to the large batch" in result.summary
    assert result.summary.split(":")[0] in " ".join(repr(result).split())
    top = result._repr_html_()
    assert '<strong class="sound">' in top
    assert "Local on TensorDataset, global batch 12" in top
    assert "<table>" in top
    assert result.sweep_id == result.folder.name
    assert not list(result.folder.rglob("handed_over"))


def test_figures_are_drawn_by_name_without_pyplot(result: SweepResult) -> None:
    """By as much of the name as tells it; others are refused with the names there are."""
    before = sys.modules.get("matplotlib.pyplot")
    figure = result.figure("loss", width="single")
    assert figure.get_size_inches()[0] == 3.5
    assert figure.axes[0].get_ylabel() == "train loss"
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert sys.modules.get("matplotlib.pyplot") is before
    for name in ("mem", "", "losses"):
        with pytest.raises(BadInputError, match="is not one of loss_curves, memory, step_time"):
            result.figure(name)
    with pytest.raises(BadInputError, match="batches has nothing to show"):
        result.figure("batches")


def test_an_old_sweep_is_compared_again(result: SweepResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, from what its arms have left."""
    monkeypatch.chdir(result.folder.parent.parent)
    again = compare(result.sweep_id)
    assert again.table.to_csv() == result.table.to_csv()
    assert again.folder == Path("reports", result.sweep_id)
    with pytest.raises(BadInputError, match="20990101-000000-abcdef: no such sweep"):
        compare(["20990101-000000-abcdef"])


@pytest.mark.parametrize(
    ("overrides", "named", "said"),
    [
        (["accum.stepz=2"], {}, "accum.stepz: no such key, did you mean 'accum.steps'?"),
        (["accum.steps=2"], {"accum_steps": 4}, "accum_steps= and 'accum.steps=2' both say accum.steps"),
        (["model=mlp"], {"model": nn.Linear(4, 3)}, "model= and 'model=mlp' both say model"),
        (["task=audit"], {}, "task=audit: sweep() trains; for others there is python -m gaccum_exp"),
        (["--cfg=job"], {}, "--cfg: has no meaning in sweep()"),
        ([["a=1"]], {}, "an override is a text"),
        ([], {"accum_steps": []}, "accum_steps=[]: there is no value"),
        ([], {"steps": 2, "epochs": 1}, "train.steps=2 and train.epochs=1 are both training lengths"),
    ],
)
def test_what_cannot_be_used_is_raised_in_a_line(
    overrides: list[Any], named: dict[str, Any], said: str
) -> None:
    """As an error that Python code can catch, with the words of the command line."""
    with pytest.raises(BadInputError) as refused:
        sweep(*overrides, **named)
    assert said in str(refused.value)


def unruly(*overrides: str) -> SweepResult:
    """Sweep a model of which N = 2 may be interrupted and N = 3 fails; it is made anew each time."""

    class Unruly(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 6 and Path("press").exists():
                Path("press").unlink()
                signal.raise_signal(signal.SIGINT)
            if len(x) == 4:
                raise RuntimeError("a fault of its own")
            return super().forward(x)

    torch.manual_seed(3)
    return sweep(
        "audit.at_start=false", *overrides, model=Unruly(4, 3), criterion=nn.CrossEntropyLoss(),
        data=list(zip(X.float(), Y, strict=True)), optimizer=torch.optim.SGD,
        accum_steps=(1, 2, 3), global_batch_size=12, steps=2, device="cpu",
    )  # fmt: skip


def test_an_interrupted_sweep_goes_on_with_the_same_objects_and_keeps_arms_that_fail(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C ends it in order and is raised; then, in another thread, what is left is trained.

    An arm that fails raises nothing: it is in the table with its reason.
    """
    Path("press").touch()
    with pytest.raises(KeyboardInterrupt):
        unruly()
    said = capfd.readouterr().err
    assert "1 arm did not finish, 1 of 3 never started; to go on:" in said
    assert "sweep('audit.at_start=false', 'sweep.resume=" in said
    assert "model=…, criterion=…, data=…, optimizer=…, accum_steps=(1, 2, 3)" in said
    found: list[SweepResult] = []
    thread = threading.Thread(target=lambda: found.append(unruly("sweep.resume=last")))
    thread.start()
    thread.join()
    assert "1 of 2 arms begun have ended" in capfd.readouterr().err
    table = found[0].table
    assert list(table.status) == ["FINISHED", "FINISHED", "FAILED"]
    assert list(table.failure)[2] == "RuntimeError: a fault of its own"


def test_the_package_shows_its_public_names_alone() -> None:
    """All of them lead somewhere, and nothing else is listed."""
    assert sorted(dir(gaccum_exp)) == sorted(["__version__", *gaccum_exp.__all__])
    for name in gaccum_exp.__all__:
        assert getattr(gaccum_exp, name).__module__ == gaccum_exp._HOMES[name]
