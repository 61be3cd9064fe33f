"""`mlflow server` over SQLite or PostgreSQL, that can be killed and come back at the same address."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

STARTS_S = 120
"""By then a server has started, or does not."""


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class MlflowServer:
    """A server with its database in a folder.

    Args:
        folder: of the database and of what runs keep.
        database: its URI; None: SQLite in the folder, the store that is there or a new one.
    """

    def __init__(self, folder: Path, database: str | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.database = database or f"sqlite:///{folder / 'mlflow.db'}"
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # two processes that nothing here needs
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                    "--port", str(self.port), "--workers", "1",
                    "--backend-store-uri", self.database,
                    "--artifacts-destination", str(self.folder / "kept"),
                ],
                cwd=self.folder, env=os.environ | own, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + STARTS_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"mlflow server does not start: see {self.folder / 'server.log'}")

    def kill(self) -> None:
        """Kill it and all of its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def mlflow_server(folder: Path, database: str | None = None) -> Iterator[MlflowServer]:
    """Run a server while the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(folder, database)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def no_postgresql() -> str | None:
    """Return why there is no PostgreSQL to be started here; None: there is."""
    if _postgresql() is None:
        return "PostgreSQL is not installed (Debian: apt install postgresql)"
    if not any(map(importlib.util.find_spec, ("psycopg", "psycopg2"))):
        return "its driver is not installed (pip install 'psycopg[binary]')"
    return None


def _postgresql() -> Path | None:
    """Return the folder of initdb and pg_ctl: Debian does not put it on the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    on_path = shutil.which("initdb")
    places = [*reversed(debian), *([Path(on_path).parent] if on_path else [])]
    return next((place for place in places if (place / "initdb").exists()), None)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Run a PostgreSQL in a new folder, on a port of this machine; yield its database's URI."""
    programs = _postgresql()
    assert programs is not None
    user = pwd.getpwuid(os.getuid()).pw_name
    as_whom: dict[str, object] = {}
    if os.getuid() == 0:  # which it refuses
        user = "nobody"
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        as_whom = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    port, data = free_port(), folder / "data"

    def call(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"LC_ALL": "C"},
            **as_whom,
        )  # type: ignore[call-overload]  # what is in `as_whom` is not known there
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr or done.stdout}")

    call("initdb", "-D", str(data), "-A", "trust", "-U", "gaccum", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    call("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql://gaccum@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
