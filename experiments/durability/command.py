"""Commands as a user starts them, in a folder of their own, and the processes that they consist of."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[2]
HERE = "experiments.durability"
TRUTH = "truth"
MARK = "DURABILITY_COMMAND"
"""In the environment of all processes of a command: by this they are found, whoever adopts them."""
PATIENCE_S = 120
"""After so long a command that does not end is ended, and counted as hanging."""
_numbers = itertools.count()


def overrides(
    folder: Path,
    *,
    windows: int,
    pause_s: float = 0.004,
    eval_every: int = 10**9,
    eval_pause_s: float = 0.0,
) -> list[str]:
    """Return what has a command train the witness on the CPU for so many windows."""
    return [
        "model=custom", f"model._target_={HERE}.witness.Linear", f"+model.pause_s={eval_pause_s}",
        "data=custom", f"data.train._target_={HERE}.witness.points", "data.global_batch_size=2",
        f"data.eval._target_={HERE}.witness.points", "+data.eval.samples=32", "+data.eval.seed=1",
        "data.eval_batch_size=32",
        "criterion=custom", f"criterion._target_={HERE}.witness.SquaredError",
        "optimizer=custom", f"optimizer._target_={HERE}.witness.SGD", "optimizer.lr=0.01",
        f"+optimizer.truth={folder / TRUTH}", "+optimizer.sweep=${sweep_id}",
        "+optimizer.arm='${accum.steps}-${seed}'", "+optimizer.accum_steps=${accum.steps}",
        f"+optimizer.pause_s={pause_s}", "runtime.device=cpu", "runtime.threads=1",
        "audit.at_start=false", f"train.steps={windows}", f"train.eval_every_steps={eval_every}",
    ]  # fmt: skip


class Running:
    """A command that was started.

    Args:
        folder: takes what it writes to the terminal.
        arguments: of `python -m gaccum_exp`.
        cwd: its working directory; None: the folder.
        environment: beside this process's.
    """

    def __init__(
        self, folder: Path, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> None:
        self.folder, self.arguments = folder, arguments
        self.mark = uuid.uuid4().hex
        number = next(_numbers)
        self.out, self.err = folder / f"out-{number}", folder / f"err-{number}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "HYDRA_"))}
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.start_s = time.time()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gaccum_exp", *arguments], cwd=cwd or folder,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=inherited | own | environment,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self.process.poll() is None

    @property
    def text(self) -> str:
        """What it has written to the terminal."""
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def processes(self) -> list["Process"]:
        """Return its living processes, the first one first if it lives."""
        found = [process for process in living() if process.marked(self.mark)]
        return sorted(found, key=lambda process: (process.pid != self.pid, process.pid))

    def helpers(self) -> list["Process"]:
        """Return the processes that record."""
        return [process for process in self.processes() if process.is_helper]

    def trainings(self) -> list["Process"]:
        """Return the processes that do not record: the first one, and those that it has train."""
        return [process for process in self.processes() if not process.is_helper]

    def ended(self, patience_s: float = PATIENCE_S) -> int | None:
        """Wait until its first process has ended; return the status, None if it had to be ended."""
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def settled(self, patience_s: float = 60) -> list[str]:
        """Wait until no process of it is left; return those that had to be ended, as lines."""
        until = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        lines = [f"{process.pid} {process.line[:120]}" for process in left]
        kill(left)
        self.process.poll()
        return lines


@dataclass(frozen=True)
class Process:
    """A living process."""

    pid: int
    line: str
    """Its command line."""

    def marked(self, mark: str) -> bool:
        """Whether it has this mark in its environment."""
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            return f"{MARK}={mark}".encode() in Path(f"/proc/{self.pid}/environ").read_bytes().split(
                b"\0"
            )
        return False

    @property
    def is_helper(self) -> bool:
        """Whether it delivers what another one records."""
        return "gaccum_exp.tracking" in self.line

    @property
    def resident_kib(self) -> int | None:
        """What it holds in memory, KiB; None: it has ended."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[0])
        return None


def living() -> Iterator[Process]:
    """Yield the processes of this machine that have not ended."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line:  # a dead one that nobody has waited for has none
                    yield Process(int(entry.name), line.strip())


def kill(processes: Collection[Process], number: int = signal.SIGKILL) -> float:
    """Send these a signal, all at one moment; return when."""
    at = time.time()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    return at


def run(folder: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> Running:
    """Run a command to its end, and until all of its processes have."""
    running = Running(folder, *arguments, cwd=cwd, **environment)
    running.ended()
    running.settled()
    return running


def next_command(folder: Path, *arguments: str, cwd: Path | None = None) -> Running:
    """Run the next command in a folder: a single run of two windows."""
    return run(folder, *overrides(folder, windows=2, pause_s=0.0), *arguments, cwd=cwd)


def deliver(folder: Path, *arguments: str, cwd: Path | None = None) -> Running:
    """Run `gaccum_exp deliver` on all that lies in a folder, or in the working directory if given."""
    below = [name for name in ("outputs", "multirun") if ((cwd or folder) / name).exists()]
    return run(folder, "deliver", *below, *arguments, cwd=cwd)


def complaints(running: Running, status: int | Collection[int], who: str) -> list[str]:
    """Say what is wrong with the end of a command: its status, and tracebacks."""
    allowed, ended = {status} if isinstance(status, int) else set(status), running.process.returncode
    problems = []
    if ended not in allowed:
        expected = " or ".join(map(str, sorted(allowed)))
        problems.append(f"{who}: status {ended}, not {expected}: {running.text[-300:]}")
    if "Traceback" in running.text:
        problems.append(f"{who}: a traceback: {running.text[-600:]}")
    return problems


def said_again(running: Running) -> list[str]:
    """Return the lines that stand more than once on its stderr, numbers aside; progress is none."""
    if "Traceback" in running.text:  # which is what there is to complain of
        return []
    lines = [re.sub(r"[0-9a-f]{8,}|\d+(\.\d+)?", "#", line) for line in _lines_of(running.err)]
    return [f"said {n} times: {line[:200]}" for line, n in Counter(lines).items() if n > 1]


def _lines_of(err: Path) -> list[str]:
    lines = err.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip() and not re.search(r": \d+/\d+( |$)", line)]


@contextlib.contextmanager
def folders(keep: Path | None) -> Iterator["Folders"]:
    """Give new folders with an empty store each; they are removed at the end unless they are kept."""
    base = keep or Path(tempfile.mkdtemp(prefix="durability-"))
    base.mkdir(parents=True, exist_ok=True)
    base.chmod(0o711)  # PostgreSQL's own user has to get through
    try:
        yield Folders(base)
    finally:
        if keep is None:
            shutil.rmtree(base, ignore_errors=True)


class Folders:
    """Makes the folders of tries."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.store = base / "empty.db"
        if not self.store.exists():
            MlflowClient(f"sqlite:///{self.store}").search_experiments()

    def new(self, name: str, *, store: bool = True) -> Path:
        """Return a new folder, with a store without runs unless it is not wanted."""
        folder = self.base / re.sub(r"\W+", "-", name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if store:
            shutil.copyfile(self.store, folder / "mlflow.db")
        return folder

    def done(self, folder: Path, *, keep: bool) -> None:
        """Remove a try's folder, unless there is something to look at."""
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
