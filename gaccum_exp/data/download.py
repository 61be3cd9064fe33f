"""Find torchvision's data sets on this machine, or download them.

torchvision reports a missing data set in several ways, and without a network it may first wait for
minutes. Here every case ends in one line that says what is missing, where it was looked for and how
to supply it, and a network that does not answer is given up on within seconds.
"""

import http.client
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.utils import check_integrity

from gaccum_exp.errors import BadInputError

ANSWER_TIMEOUT_S = 5.0
"""How long a server may take to answer, and then to send each next piece."""

Source = type[MNIST] | type[CIFAR10]


def load(source: Source, root: str, train: bool, download: bool) -> Any:
    """Return torchvision's data set, read from files below `root`.

    Where the files are absent or damaged, they are unpacked from torchvision's archives, if those
    are intact in the place where torchvision puts them; else they are downloaded, if `download`
    says so. Raises `BadInputError` where that leaves nothing to read.
    """
    folder = Path(root).expanduser()
    try:
        return source(folder, train=train)
    except (RuntimeError, ValueError, AssertionError, IndexError, EOFError, OSError):
        # What torchvision raises for absent files, for another checksum and for cut-off files.
        present = all(check_integrity(folder / path, md5) for path, md5 in _archives(source))
    if not present and not download:
        raise _missing(source, folder, "data.download is false")
    try:
        if not present:
            _ask_servers(source)
        _unpack(source, folder)
        return source(folder, train=train)
    except (RuntimeError, OSError) as error:
        action = "unpacked" if present else "downloaded"
        raise _missing(source, folder, f"it cannot be {action} ({error})") from error


def _missing(source: Source, folder: Path, reason: str) -> BadInputError:
    files = ", ".join(path for path, _ in _archives(source))
    message = (
        f"data set {source.__name__} is missing or damaged in {folder.resolve()}, and {reason}: "
        f"put {files} into that folder (published at {_servers(source)[0].rpartition('/')[0]}), "
        "or set data.root to the folder that holds it"
    )
    return BadInputError(" ".join(message.split()))


def _archives(source: Source) -> list[tuple[str, str]]:
    # The path below the root and the MD5 sum of each.
    if issubclass(source, MNIST):
        return [(f"{source.__name__}/raw/{name}", md5) for name, md5 in source.resources]
    return [(source.filename, source.tgz_md5)]


def _servers(source: Source) -> list[str]:
    # The address of one archive at each.
    if issubclass(source, MNIST):
        return [mirror + source.resources[0][0] for mirror in source.mirrors]
    return [source.url]


def _ask_servers(source: Source) -> None:
    """Raise `OSError` unless one of the servers answers in time."""
    # In threads: looking up a name has no timeout, and a server with eight unreachable addresses is
    # tried eight times.
    answers: queue.Queue[OSError | None] = queue.Queue()

    def ask(url: str) -> None:
        request = urllib.request.Request(url, method="HEAD")
        answer: OSError | None = None
        try:
            urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an answer; whether it is final, torchvision's attempt will tell
        except (OSError, http.client.HTTPException) as error:
            answer = error if isinstance(error, OSError) else OSError(str(error))
        answers.put(answer)

    urls = _servers(source)
    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    failure = OSError(f"no server answered within {ANSWER_TIMEOUT_S:g} s")
    for _ in urls:
        try:
            answer = answers.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            break
        if answer is None:
            return
        failure = answer
    raise failure


def _unpack(source: Source, folder: Path) -> None:
    """Let torchvision download and unpack in a folder of its own, then move each file into place."""
    # Arms side by side may all do this: a file is whole when it is moved, so none reads half of one.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        for path, md5 in _archives(source):
            if check_integrity(folder / path, md5):
                (Path(unpacked) / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, Path(unpacked) / path)
        before_s = socket.getdefaulttimeout()
        socket.setdefaulttimeout(ANSWER_TIMEOUT_S)
        try:
            source(unpacked, download=True)
        finally:
            socket.setdefaulttimeout(before_s)
        for file in Path(unpacked).rglob("*"):
            if file.is_file():
                target = folder / file.relative_to(unpacked)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
