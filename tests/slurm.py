"""A Slurm of one node on this machine: Debian's own, started by the tests and ended by them."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
"""
PATIENCE_S = 20.0


def why_not() -> str | None:
    """Say why there can be none here; None: there can."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"Debian's slurmctld, slurmd and munge are not installed ({', '.join(missing)} missing)"
    return None if os.getuid() == 0 else "only root starts a Slurm whose jobs are its own"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Give the variables with which Slurm's programs find one that has two CPUs and begins no job late.

    Raises:
        RuntimeError: it does not start; the message says what its logs end with.
    """
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONFIGURATION.format(
        host=platform.node().partition(".")[0], folder=folder, ports=_free_ports(2), cpus=os.cpu_count()
    ))  # fmt: skip
    environment = {"SLURM_CONF": str(conf)}
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None
        started.append(subprocess.Popen(
            [program, *arguments], env=os.environ | environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        ))  # fmt: skip

    try:
        munge = folder / "munge"
        start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}",
              f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}",
              f"--seed-file={munge / 'seed'}")  # fmt: skip
        _wait_for(lambda: (munge / "socket").exists(), folder)
        start("slurmctld", "-D", "-i", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf))
        _wait_for(lambda: b"idle" in _said(["sinfo", "-h", "-o", "%T"], environment), folder)
        yield environment
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "-u", "root"], env=os.environ | environment, timeout=10, capture_output=True
            )
            _wait_for(lambda: not _said(["squeue", "-h"], environment), folder)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _said(command: list[str], environment: dict[str, str]) -> bytes:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=30)
    return done.stdout


def _wait_for(over, folder: Path) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + PATIENCE_S
    while not over():
        if time.monotonic() > until:
            logs = [path.read_text()[-400:] for path in folder.rglob("*log") if path.is_file()]
            raise RuntimeError("Slurm does not answer: " + " / ".join(logs))
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
