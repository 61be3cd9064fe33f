"""`gaccum_exp check` on scripts as people write them, in this process where that can show it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks

from gaccum_exp.audit.check.answer import not_seen
from gaccum_exp.audit.check.checked_loop import Epoch, Group
from gaccum_exp.cli import main
from tests.support import ROOT

SCRIPTS = Path(__file__).with_name("scripts")


class Said(NamedTuple):
    status: int
    out: str
    err: str


class Check:
    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str, cost: bool = False) -> Said:
        """Check a script; of several words the first that ends in .py is one of ours."""
        self._capture.readouterr()
        given = [str(SCRIPTS / a) if a.endswith(".py") and "/" not in a[:1] else a for a in arguments]
        status = main(["check", *([] if cost else ["--no-cost"]), *given])
        return Said(status, *self._capture.readouterr())


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Iterator[Check]:
    argv, path, hidden = list(sys.argv), list(sys.path), sys.modules["__main__"]
    yield Check(capsys)
    assert (sys.argv, sys.path, sys.modules["__main__"]) == (argv, path, hidden)


def script(folder: Path, *lines: str) -> str:
    """Write a script that trains a model of two numbers; return its path."""
    path = folder / "script.py"
    head = (
        "import torch",
        "torch.manual_seed(0)",
        "model = torch.nn.Linear(2, 1)",
        "x = torch.randn(4, 2)",
    )
    path.write_text("\n".join([*head, *lines]) + "\n")
    return str(path)


STEP = (
    "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
    "def step():",
    "    for _ in range(2):",
    "        (model(x).square().mean() / 2).backward()",
    "    optimizer.step()",
    "    optimizer.zero_grad()",
)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["plain.py"], 0, ["model (Sequential), 195", "optimizer (AdamW)", "equivalent (N = 4, mean)"]),
        (["mixed_precision.py", "fp16"], 0, ["equivalent (N = 4", "mse_loss"]),
        (
            ["gan.py"],
            0,
            ["discriminator (Sequential), 129", "generator (Sequential)", "opt_g (Adam)"],
        ),
        (["checkpointed.py"], 3, ["unequal denominators", "hold 8, 8, 8, 3 samples"]),
    ],
)
def test_a_script_gets_the_right_verdict(
    check: Check, arguments: list[str], status: int, said: list[str]
) -> None:
    """With what was found said first: model, loss, optimizer and windows."""
    found = check("--windows", "1", *arguments)
    assert found.status == status, found.out
    assert [word for word in said if word not in found.out] == [], found.out
    assert "was ended after" in found.out


@pytest.mark.parametrize(
    ("fault", "cause", "remedy"),
    [
        ("not_divided", "loss scale", "the loss is not divided by N"),
        ("no_zero_grad", "stale or missing gradients", "call zero_grad before the window's first"),
        ("off_by_one", "loss scale", "1 micro-batch divided by 4"),
        ("batch_norm", 'batch statistics at module "1" (BatchNorm1d)', "GroupNorm"),
    ],
)
def test_a_planted_fault_is_named(check: Check, fault: str, cause: str, remedy: str) -> None:
    """The script is biased, with the cause and what to do."""
    windows = "2" if fault == "no_zero_grad" else "1"
    found = check("--windows", windows, "plain.py", "--fault", fault)
    assert found.status == 3
    assert f"cause: {cause}" in found.out
    assert remedy in found.out


def test_a_window_that_was_seen_in_part_is_no_answer(check: Check, tmp_path: Path) -> None:
    """A penalty comes before the first call of a module: the next window is judged in its place."""
    path = script(
        tmp_path,
        *STEP[:2],
        "    model.weight.square().sum().backward()",
        *STEP[2:],
        "for _ in range(9): step()",
    )
    for windows in ("1", "2"):
        found = check("--windows", windows, path)
        assert (found.status, "inconclusive" in found.out) == (0, False), found.out
        assert f"windows:   {windows} window" in found.out


def test_causes_of_all_windows_are_named(check: Check, tmp_path: Path) -> None:
    """What the window furthest away does not have stands below it; weights of classes are not cut."""
    path = script(
        tmp_path,
        "model, classes = torch.nn.Conv2d(2, 4, 1), torch.tensor([0.2, 1.0, 3.0, 9.0])",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        "for k in range(9):",
        "    for _ in range(2):",
        "        x, y = torch.randn(4, 2, 3, 3), torch.randint(0, 4, (4, 3, 3))",
        "        loss = torch.nn.functional.cross_entropy(model(x), y, weight=classes)",
        "        (loss / 2).backward()",
        "        if k == 0: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)",
        "    optimizer.step()",
        "    if k: model.weight.grad = torch.ones_like(model.weight) * 9",
        "    else: optimizer.zero_grad(); model.weight.grad = torch.ones_like(model.weight) * 9",
    )
    found = check(path, cost=True)
    assert found.status == 3, found.out
    assert "cause, of window 1: loss scale" in found.out, found.out
    assert "stale or missing gradients" in found.out.partition("cause, of window")[0]
    assert "Which N fits?" in found.out
    assert "not known" not in found.out


def test_what_another_window_needs_beside_is_said_once(check: Check, tmp_path: Path) -> None:
    """A fault of the epoch's end, though the window of the same cause that is further away is shown."""
    lines = (
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.01)",
        "x = torch.randn(44, 2)",
        "for epoch in range(2):",
        "    for i, part in enumerate(x.split(4)):",  # 11 micro-batches: windows of 4, 4 and 3
        "        loss = model(part).square().mean()",
        "        (loss / (4 if i > 3 else 1)).backward()",
        "        if i % 4 == 3 or i == 10:",
        "            optimizer.step()",
        "            optimizer.zero_grad()",
    )
    found = check("--windows", "3", script(tmp_path, *lines))
    assert found.status == 3
    assert "it is 3 and 0.25 × its norm away" in found.out
    assert "cause, of window 3 (N = 3): loss scale\nremedy: " in found.out, found.out
    assert "divided by 4" in found.out.partition("of window 3")[2]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's own hint
def test_what_is_wrong_beside_the_gradient_is_said(check: Check) -> None:
    """A schedule stepped in every micro-batch, and a reported loss that is the last micro-batch's."""
    found = check("plain.py", "--fault", "schedule")
    assert found.status == 0
    assert "schedule: the learning-rate schedule was stepped 3 times inside the window" in found.out
    assert "reported loss: of the window's losses only the last" in found.out


@pytest.mark.parametrize(
    ("epoch", "said"),
    [
        (None, "the data come from no DataLoader of torch's"),
        (Epoch(400, read=2), "of 400 batches of the data loader, each of which makes several"),
        (Epoch(None), "does not tell its length"),
        (Epoch(10), "no multiple of N = 4: 2 are left over"),
        (Epoch(12, last_samples=4, samples=8), "others have 8: --no-cost --windows 3"),
        (Epoch(400), "the rest of the epoch, of 100 windows"),
        (Epoch(8), "Seen: an epoch to its end"),
    ],
)
def test_what_two_windows_do_not_show_is_said(epoch: Epoch | None, said: str) -> None:
    """The leak or the wrong divisor at an epoch's end, a short last micro-batch."""
    group = Group([], [], [], 1, windows=[0, 1], sizes=[[8] * 4, [8] * 4])
    assert said in not_seen(epoch, [group], ended=True)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ("DataLoader(data, 2)", "of 8 windows that the data loader gives 1 has micro-batches"),
        ("DataLoader(data, 2)", "labels that count (window 7: 2, 1)"),
        (
            "DataLoader(data, batch_sampler=[[0, 1]] * 6 + [[2, 3], [4]] * 2)",
            "different numbers of samples (window 4: 2, 1). A mean of each",
        ),
        ("list(zip(x.split(2), y.split(2)))", None),
        ("DataLoader(data[:24], 2)", ""),
    ],
)
def test_windows_beyond_are_looked_at_for_what_they_count(
    check: Check, tmp_path: Path, loader: str, said: str | None
) -> None:
    """A rare label that is ignored, batches of other sizes; without a data loader it is left open."""
    path = script(
        tmp_path,
        "from torch.utils.data import DataLoader",
        "model, x = torch.nn.Linear(2, 3), torch.randn(32, 2)",
        "y = torch.randint(3, (32,)); y[27] = -100",
        "data = list(zip(x, y))",
        f"loader = {loader}",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        "for i, (x, y) in enumerate(loader):",
        "    (torch.nn.functional.cross_entropy(model(x), y) / 2).backward()",
        "    if i % 2: optimizer.step(); optimizer.zero_grad()",
    )
    found = check(path)
    assert found.status == 0, found.out
    assert (said or "") in found.out
    assert ("Others count unequally" in found.out) == bool(said)
    assert ("Nor seen: whether micro-batches count equally" in found.out) == (said is None)


def test_a_loader_is_known_that_is_read_before_the_loop(check: Check, tmp_path: Path) -> None:
    """A helper that collects windows has read it to its end when the first module is called."""
    path = script(
        tmp_path,
        "loader = torch.utils.data.DataLoader(torch.randn(14, 2), batch_size=4)",
        "every = list(loader)",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        "for k in range(2):",
        "    for x in every[2 * k : 2 * k + 2]:",
        "        (model(x).square().mean() / 2).backward()",
        "    optimizer.step()",
        "    optimizer.zero_grad()",
    )
    assert "the last micro-batch of the epoch, with 2 samples" in check("--windows", "1", path).out


def test_the_leak_of_an_epochs_rest_is_named_where_it_is_reached(check: Check) -> None:
    """Ten micro-batches of N = 4: the window after the epoch's end has six."""
    found = check("--windows", "3", "plain.py", "--samples", "80")
    assert found.status == 3
    assert "an earlier window's gradients were left over" in found.out


def test_several_files_with_arguments_run_as_they_would(check: Check, tmp_path: Path) -> None:
    """A package and a module beside the script, a required option, a file that `with` closes."""
    out = tmp_path / "log.txt"
    found = check("project/run.py", "--width", "8", "--out", str(out))
    assert found.status == 0
    assert "encoder (Encoder) + decoder (Decoder), 110 parameters" in found.out
    assert out.read_text() == "0\n"  # the second step was not taken


def test_a_module_runs_as_under_python_m(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-m package.module` with the working directory first on the path."""
    package = tmp_path / "i18_package"
    package.mkdir()
    (package / "__init__.py").touch()
    Path(script(tmp_path, *STEP, "import sys; print(sys.argv[1:]); step(); step(); step()")).rename(
        package / "train.py"
    )
    monkeypatch.chdir(tmp_path)
    found = check("-m", "i18_package.train", "--its", "own")
    assert found.status == 0
    assert found.out.startswith("['--its', 'own']\n")
    assert check("-m", "i18_package.nothing").status == 2


def test_memory_and_time_follow_the_verdict(check: Check) -> None:
    """The smallest N within a budget, advice in Python's words, seconds at N = 1, 2, 4, 8."""
    found = check("--memory-budget-gib", "5.5e-6", "--windows", "1", "plain.py", cost=True)
    assert found.status == 0
    assert re.search(r"N = 4 is the smallest that fits the budget of \d", found.out), found.out
    assert re.search(r"\n +1 +32 .*\n\*? *2 +16 .*\n\*? *4 +8 .*\n\*? *8 +4 ", found.out), found.out
    assert "medians of 10 in turn" in found.out
    assert "runtime." not in found.out


NOISY = (
    "optimizer = torch.optim.Adam(model.parameters(), lr=0.01)",
    "for _ in range(40):",
    "    for _ in range(4):",
    "        x = torch.randn(8, 2)",
    "        loss = LOSS",
    "        (loss / 4).backward()",
    "    optimizer.step()",
    "    optimizer.zero_grad()",
)


def test_asked_for_noise_it_says_on_which_side_of_its_scale_the_batch_is(
    check: Check, tmp_path: Path
) -> None:
    """In the optimizer's own metric; else why there is none, and what would tell instead."""
    worth = "\nIs so large a batch worth it? "

    def said(loss: str, *how: str) -> str:
        lines = [line.replace("LOSS", loss) for line in NOISY]
        found = check("--noise", *how, script(tmp_path, *lines))
        return found.out.partition(worth)[2]

    labels = "(torch.randn(8, 1) + x.sum(1, keepdim=True))"
    told = said(f"torch.nn.functional.mse_loss(model(x), {labels}) + 0.01 * model(x).square().mean()")
    assert re.match(r"The noise scale is .* samples \(.*15 windows, in Adam's metric\): ", told), told
    assert "the script's batch of 32" in told
    coupled = said("-torch.log_softmax(model(x) @ model(x).mT, 1).diagonal().mean()", "--windows", "2")
    assert coupled.startswith("No noise scale tells: "), coupled
    assert "docs/howto/compare_batches.md" in coupled
    assert worth not in check("plain.py").out


def test_documents_of_other_lengths_are_timed_in_the_longest_shape(check: Check) -> None:
    """And it is said; eight documents are cut into one, two, four and eight micro-batches."""
    found = check("--windows", "1", "streamed.py", cost=True)
    assert found.status == 3
    assert "does not tell its length" in found.out
    assert "micro-batches count" in found.out
    assert "Micro-batches differ in shape" in found.out
    assert re.search(r"\n +8 +1 ", found.out)


def test_a_script_that_fails_shows_its_own_traceback(check: Check) -> None:
    """Nothing is added before a window was judged, but a line; after one, there is an answer, too."""
    early, late = check("failing.py", "0"), check("failing.py", "1")
    assert (early.status, late.status) == (1, 1)
    assert early.err.startswith("Traceback (most recent call last):\n")
    assert str(ROOT / "gaccum_exp") not in early.err
    assert early.err.rstrip().endswith("FAILED by itself, before a step was judged")
    assert early.out == ""
    assert "failing.py FAILED by itself, after 1 window of 2.\n" in late.out
    assert "equivalent (N = 2" in late.out
    assert "Seen: the whole script" not in late.out


def test_a_script_that_is_interrupted_is_answered_by_what_was_judged(
    check: Check, tmp_path: Path
) -> None:
    """After one window of two there is its verdict, and the status of an interruption."""
    path = script(tmp_path, *STEP, "step()", "raise KeyboardInterrupt")
    found = check(path)
    assert found.status == 130
    assert "script.py was interrupted, after 1 window of 2.\n" in found.out
    assert "Yes: what reached the optimizer" in found.out


def test_a_long_check_says_how_far_it_is(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that some seconds have passed."""
    monkeypatch.setattr("gaccum_exp.arms.check.PATIENCE_S", 0.0)
    found = check("--windows", "3", "plain.py")
    said = [line for line in found.err.splitlines() if "gaccum_exp check: window" in line]
    assert said == [f"gaccum_exp check: window {i} of 3 is equivalent" for i in (1, 2, 3)]
    seconds = iter([0.0, 1.0, 1e9, 1e9, 1e9])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("gaccum_exp.arms.check.time", clock)
    monkeypatch.setattr("gaccum_exp.arms.check.PATIENCE_S", 5.0)
    both = "gaccum_exp check: window 1 of 2 is equivalent, window 2 of 2 is equivalent"
    assert both in check("--windows", "2", "plain.py").err


def test_an_exit_of_the_scripts_own_is_passed_on(check: Check, tmp_path: Path) -> None:
    """With a status, and with a sentence; `sys.exit(0)` after a window leaves the verdict's."""
    with pytest.raises(SystemExit) as end:
        check(script(tmp_path, "import sys; sys.exit(7)"))
    assert end.value.code == 7
    assert check(script(tmp_path, *STEP, "step(); import sys; sys.exit(6)")).status == 6
    assert check(script(tmp_path, *STEP, "step(); import sys; sys.exit()")).status == 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["print(model(x).mean().item())"], "Only steps of torch.optim.Optimizer"),
        (
            ["model(x).mean().backward()", "for p in model.parameters(): p.data -= 0.1 * p.grad"],
            "Only steps of torch.optim.Optimizer",
        ),
        (
            [
                *("w = torch.ones(2, requires_grad=True)", "o = torch.optim.SGD([w], lr=0.1)"),
                *("(x @ w).mean().backward()", "o.step()"),
            ],
            "Optimizer steps were taken, but none after a call of a module",
        ),
    ],
)
def test_what_cannot_be_judged_is_said_in_a_sentence(
    check: Check, tmp_path: Path, lines: list[str], said: str
) -> None:
    """No step, an update by hand, a model that is no module: inconclusive, with the way out."""
    found = check(script(tmp_path, *lines))
    assert found.status == 5
    assert said in found.out


def test_several_processes_are_refused(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun's environment says; so is a script that is not there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = check("plain.py")
    assert found.status == 2
    assert "WORLD_SIZE=2" in found.err
    monkeypatch.delenv("WORLD_SIZE")
    assert "no such file" in check("nothing.py").err
    assert check("--windows", "0", "plain.py").status == 2


def test_the_end_runs_what_is_to_run_at_an_end(check: Check, tmp_path: Path) -> None:
    """`finally` runs, `except Exception` does not see it, and nothing of torch's stays hooked."""
    lines = [
        *("try:", "    while True:", "        try:", "            step()", "        except Exception:"),
        *("            print('swallowed')", "finally:", "    print('finally')"),
    ]
    before = torch.optim.Optimizer.__init__
    found = check(script(tmp_path, *STEP, *lines))
    assert found.out.startswith("finally\n")
    assert torch.optim.Optimizer.__init__ is before
    assert not _global_optimizer_pre_hooks
    assert not _global_forward_pre_hooks


def test_a_script_that_swallows_everything_is_ended_all_the_same(tmp_path: Path) -> None:
    """In a process of its own, which ends in its midst with the verdict's status."""
    lines = ["while True:", "    try:", "        step()", "    except:", "        pass"]
    line = [sys.executable, "-m", "gaccum_exp", "check", "--no-cost", script(tmp_path, *STEP, *lines)]
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "equivalent (N = 2" in done.stdout
    assert "The script swallows its end" in done.stdout


def test_of_windows_that_are_biased_the_furthest_is_shown(check: Check) -> None:
    """And how far each is: the first may be the least."""
    found = check("--windows", "3", "checkpointed.py")
    (said,) = re.findall(r"No: .*: it is (.*) × its norm away", found.out)
    least, most = (float(value) for value in said.split(" to "))
    assert least < most
    (shown,) = re.findall(r"biased \(N = \d+, \w+\): off by (\S+) × ", found.out)
    assert float(shown) == most


def test_processes_of_before_are_not_taken_for_the_scripts(check: Check, tmp_path: Path) -> None:
    """Whoever checks may have run others; the sentence is on what the script itself has done."""
    busy = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    found = check(script(tmp_path, "model(x).sum().backward()"))
    assert "Only steps of torch.optim.Optimizer" in found.out
