"""A PostgreSQL server of one's own, from Debian's package: for tests and the durability experiment."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "gaccum"


def programs() -> Path | None:
    """Return the folder of the newest `initdb` and `pg_ctl`; None if there are none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def why_not() -> str | None:
    """Return why no server can be started here; None if one can."""
    if programs() is None:
        return "PostgreSQL is not installed (apt-get install postgresql)"
    if os.getuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        return "PostgreSQL does not run as root, and there is no user `postgres`"
    return None


class PostgresServer:
    """A server on a free port of 127.0.0.1, with its data in this folder."""

    def __init__(self, folder: Path, password: str | None = None) -> None:
        """Create its data.

        Args:
            folder: empty, below folders that everybody may enter: root hands it to another user.
            password: that a client must give; None: it is trusted.
        """
        found = programs()
        assert found is not None, why_not()
        self._programs, self.folder = found, folder
        self._password = {} if password is None else {"PGPASSWORD": password}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        secret = folder / "password"
        secret.write_text(password or "unused")
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")
        method = "trust" if password is None else "scram-sha-256"
        self._call(
            "initdb", "--no-sync", "--encoding=UTF8", "--locale=C", "--username", USER,
            f"--auth={method}", f"--pwfile={secret}", "-D", str(folder / "data"),
        )  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it answers."""
        # Whether it keeps what it has when the machine dies is not asked here: it waits for no disk.
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -F"
        self._call(
            "pg_ctl", "-D", str(self.folder / "data"), "-w", "-l", str(self.folder / "log"),
            "-o", options, "start",
        )  # fmt: skip

    def stop(self, how: str = "fast") -> None:
        """Stop it: `fast`, or `immediate` as if it had died."""
        self._call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", how, "stop")

    def uri(self, database: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Create a database and return its address."""
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-q", "postgres"]
        self._call("psql", *where, "-c", f"CREATE DATABASE {database}")
        return self.uri(database)

    def _call(self, program: str, *arguments: str) -> None:
        as_postgres = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        done = subprocess.run(
            [str(self._programs / program), *arguments], cwd="/", stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **as_postgres,
            env=os.environ | self._password,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr.strip()[-500:]}")


@contextmanager
def postgres_server(password: str | None = None) -> Iterator[PostgresServer]:
    """Start a server with its data in a new temporary folder; stop it and remove that at the end."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(Path(folder), password)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
