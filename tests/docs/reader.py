"""A reader who follows a page: types what it shows, in a folder of their own, and compares what comes.

What a page takes for granted that its reader has (a model, a table, a folder of pictures) is in
`given/`: a program of the page's name, which runs first. Addresses and ids, for which only the reader
has a name, are replaced by those of servers that are started here, and of the newest runs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.mlflow_browser import mlflow_server
from experiments.postgresql import postgres_server
from tests.docs.shown import Block
from tests.program import environment
from tests.slurm import slurm

GIVEN = Path(__file__).with_name("given")
PATIENCE_S = 900
ID = r"\d{8}-\d{6}-[0-9a-f]{6}"
END = "=== end of the block: "
SESSION = f"""
import json, sys, traceback
for block in sys.stdin:
    try:
        exec(compile(json.loads(block), "<page>", "exec"), globals())
        ended = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        ended = 1
    print("\\n{END}" + str(ended), flush=True)
"""
"""A session of Python that takes blocks as lines of JSON and says how each has ended."""


def given_for(page: str) -> Path:
    """Return where the program is that makes what the reader of a page has."""
    return GIVEN / f"{page.removeprefix('docs/').removesuffix('.md').replace('/', '_')}.py"


class Reader:
    """Follows one page from its top to its end, in an empty folder that holds what is given."""

    def __init__(self, page: str, folder: Path) -> None:
        self.folder = folder
        self.printed = ""
        self._exports: list[str] = []
        self._started = ExitStack()
        self._python: subprocess.Popen[str] | None = None
        self._places: dict[str, str] = {}
        path = str(Path(sys.executable).parent)
        self._variables = environment() | {
            "PATH": f"{path}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "COLUMNS": "80",
        }
        self._variables.pop("PYTEST_CURRENT_TEST", None)  # with it kernels and pools behave otherwise
        if (given := given_for(page)).exists():
            self.python(given.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End what was started."""
        self._started.close()

    def follow(self, block: Block) -> None:
        """Write the file, type the commands, or compare what was printed with what the page shows.

        Raises:
            AssertionError: it is not as written; the message holds what was printed.
        """
        if block.mark == "file":
            path = self.folder / str(block.said)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            self.printed = "".join([self.shell(command) for command in block.commands])
        elif block.language == "python":
            self.printed = self.python(self._replaced(block.text))
        elif block.language == "text":
            assert (missing := unseen(block.text, self.printed)) == [], f"{missing}\n{self.printed}"
        else:
            raise AssertionError("neither a command nor output: a mark has to say what it is")

    def shell(self, command: str) -> str:
        """Run a command to 0, or to the exit status that its comment gives; return its output.

        One whose comment says that it is interrupted gets a Ctrl-C once it has recorded something.
        """
        comment = command.rpartition("  #")[2] if "  #" in command else ""
        found = re.search(r"exit status (\d+)", comment)
        expected = int(found[1]) if found else 0
        if command.startswith("export "):
            self._exports.append(command)
            return ""
        if "hydra/launcher=submitit_slurm" in command:
            self._place("slurm", self._slurm)
        line = "\n".join([*self._exports, self._replaced(command)])
        before = self._points()
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=self._variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        if "interrupted" in comment:
            expected = 130
            self._wait(lambda: self._points() > before, process)
            os.killpg(process.pid, signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        print(f"$ {line}\n{out}")
        assert process.returncode == expected, f"{line}\n{out}"
        return out

    def python(self, code: str) -> str:
        """Run code in the page's session, tests in it by pytest; return what is printed."""
        if re.search(r"^def test_", code, re.MULTILINE):
            path = self.folder / "test_of_the_page.py"
            path.write_text(code, encoding="utf-8")
            return self.shell(f"python -m pytest -q -p no:cacheprovider {path.name}")
        if self._python is None:
            self._python = self._started.enter_context(subprocess.Popen(
                [sys.executable, "-u", "-c", SESSION], cwd=self.folder, env=self._variables, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ))  # fmt: skip
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        self._python.stdin.write(json.dumps(code) + "\n")
        self._python.stdin.flush()
        lines: list[str] = []
        for line in self._python.stdout:
            if line.startswith(END):
                break
            lines.append(line)
        out = "".join(lines)
        print(out)
        assert line == f"{END}0\n", f"{code}\n{out}"
        return out

    def _replaced(self, text: str) -> str:
        """Return what is typed with the reader's own ids and addresses."""
        for folder in ("outputs", "multirun"):
            text = re.sub(rf"\b{folder}/{ID}", lambda _, of=folder: f"{of}/{self._newest(of)[-1]}", text)
        text = re.sub(
            r"(SWEEP_ID ?)+(\.\.\.)?", lambda _: " ".join(self._newest("multirun")) + " ", text
        )
        for shown, start in (
            ("HOST:5000", self._mlflow), ("127.0.0.1:5000", self._mlflow),
            ("postgresql://me@db/mlflow", self._postgres), ("HEAD:6379", self._ray),
        ):  # fmt: skip
            if shown in text:
                text = text.replace(shown, self._place(start.__name__, start))
        return text

    def _newest(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.folder / folder).iterdir())

    def _points(self) -> int:
        journals = self.folder.glob("*/**/journal*.jsonl")
        return sum(path.read_text(encoding="utf-8").count('"points"') for path in journals)

    @staticmethod
    def _wait(over: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not over():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)

    def _place(self, name: str, start: Callable[[], str]) -> str:
        if name not in self._places:
            self._places[name] = start()
        return self._places[name]

    def _mlflow(self) -> str:
        server = mlflow_server(f"sqlite:///{self.folder / 'served.db'}", self.folder / "server.log")
        return self._started.enter_context(server).removeprefix("http://")

    def _postgres(self) -> str:
        return self._started.enter_context(postgres_server()).create("mlflow")

    def _slurm(self) -> str:
        self._variables |= self._started.enter_context(slurm(self.folder / "slurm"))
        return ""

    def _ray(self) -> str:
        # A path of the page's folder is too long for its sockets; the usual one is kept as that of a
        # Ray that runs, for later ones to look for.
        place = self._started.enter_context(TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
        command = ["ray", "start", "--head", "--block", "--port=6379", "--num-cpus=4"]
        log = self._started.enter_context((self.folder / "ray.log").open("w+"))
        head = self._started.enter_context(subprocess.Popen(
            [*command, "--include-dashboard=false", f"--temp-dir={place}"],
            cwd=self.folder, env=self._variables,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        ))  # fmt: skip
        self._started.callback(os.killpg, head.pid, signal.SIGTERM)
        said = self.folder / "ray.log"
        self._wait(lambda: "Ray runtime started" in said.read_text(encoding="utf-8"), head)
        return "127.0.0.1:6379"


OF_THE_MOMENT = re.compile(
    r"(?s)other\s+processes\s+had\s+the\s+processor.*?\binclude\b|their\s+quartiles\s+up\s+to.*?off"
    r"|a\s+step\s+there\s+takes.*?as\s+long"
)
"""What depends on a machine's load while it measures: under much of it no ratio of times is stated."""


def unseen(shown: str, printed: str) -> list[str]:
    """Return those of the lines that a page shows whose words were not printed; numbers may differ.

    `…` stands for anything.
    """
    said, missing = f" {' '.join(words(printed))} ", []
    for part in re.split(r"\n|…|\.\.\.", OF_THE_MOMENT.sub("", shown)):
        _, found, after = said.partition(f" {' '.join(words(part))} ")
        if not words(part):
            continue
        if found:
            said = f" {after}"
        else:
            missing.append(part.strip())
    return missing


def words(text: str) -> list[str]:
    """Return the words of two letters or more, without units of size and time."""
    found = re.findall(r"[^\W\d_]{2,}", text)
    return [word for word in found if word not in {"GiB", "MiB", "KiB", "ms", "seconds", "second"}]
