"""Checkpoints as folders, of which only a whole one counts.

    checkpoints/step-00000120/      after 120 optimizer steps
    checkpoints/step-00000120+3/    with three micro-batches of the next window done
        .metadata  __0_0.distcp     as `torch.distributed.checkpoint` has them
        manifest.json               the size and the SHA-256 of each, and whose they are; written last

The first line of a manifest is the digest of the rest. A folder is written under another name, flushed
to the disk, and then renamed. torch is not imported before something is written or read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaccum_exp.errors import BadInputError, first_line

if TYPE_CHECKING:
    from gaccum_exp.train.checkpoint.encoding import Encoded

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PARTIAL, REPLACED = ".partial", ".replaced"
_NAME = re.compile(r"step-(\d{8,})(?:\+(\d+))?")
_LEFT_OVER = re.compile(rf"{_NAME.pattern}({re.escape(PARTIAL)}|{re.escape(REPLACED)})")


class UnusableCheckpointError(BadInputError):
    """A checkpoint is damaged, holds what it must not, or is of another training."""


def name_of(global_step: int, passes_done: int = 0) -> str:
    """Return the name of a checkpoint's folder.

    Args:
        global_step: optimizer steps taken.
        passes_done: micro-batches done of the window that has begun.
    """
    return f"step-{global_step:08}" + (f"+{passes_done}" if passes_done else "")


def place_of(path: Path) -> tuple[int, int] | None:
    """Return the global step and the micro-batches done by a folder's name; None: it is none."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else (int(found[1]), int(found[2] or 0))


def write(folder: Path, name: str, encoded: "Encoded", run: str = "") -> Path:
    """Write a checkpoint, and return it once it is whole and on the disk.

    Args:
        folder: of the checkpoints.
        name: of this one.
        encoded: the training.
        run: the token of the run that it is of.

    Raises:
        Exception: it cannot be written; nothing of it is left.
    """
    from gaccum_exp.train.checkpoint.dcp_writer import save  # takes long, and not every run writes

    path, partial = folder / name, folder / f"{name}{PARTIAL}"
    remove(partial)
    try:
        partial.mkdir(parents=True)
        save(partial, encoded)
        _write_manifest(partial, name, run)
        if path.exists():  # one that does not count, or the same
            remove(folder / f"{name}{REPLACED}")
            path.rename(folder / f"{name}{REPLACED}")
        partial.rename(path)
        _flush(folder)
    except BaseException:
        remove(partial)
        raise
    remove(folder / f"{name}{REPLACED}")
    return path


def read(path: Path) -> "Encoded":
    """Return what was written, from a checkpoint that counts.

    Raises:
        UnusableCheckpointError: it does not count, or holds something else than tensors and values.
    """
    from gaccum_exp.train.checkpoint.dcp_reader import load

    manifest, fault = _checked(path)
    if fault:
        raise UnusableCheckpointError(f"{path}: {fault}")
    try:
        return load(path, manifest["files"])
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UnusableCheckpointError(f"{path}: cannot be read ({why})") from error


def newest(folder: Path, run: str = "", until: int | None = None) -> Path | None:
    """Return the newest checkpoint in a folder that counts; None: there is none.

    Says of each that it passes over why it does not count.

    Args:
        folder: of the checkpoints.
        run: the token of the run; those of another one do not count.
        until: the last global step that it may have; None: any.
    """
    for path in _checkpoints(folder):
        place = place_of(path)
        if until is not None and place is not None and place[0] > until:
            log.warning("%s is passed over: what was recorded ends with step %d", path, until)
            continue
        fault = fault_of(path, run)
        if fault is None:
            return path
        log.warning("%s does not count: %s", path, fault)
    return None


def fault_of(path: Path, run: str = "") -> str | None:
    """Return why a checkpoint does not count for a run; None: it does."""
    manifest, fault = _checked(path)
    return fault or (None if manifest.get("run") == run else "it is of another run")


def prune(folder: Path, last: Path, keep: int) -> None:
    """Remove all but the newest checkpoints.

    Args:
        folder: of the checkpoints.
        last: the one that has just been written; what is further on was passed over.
        keep: how many stay, this one included.
    """
    older = [path for path in _checkpoints(folder) if place_of(path) < place_of(last)]  # type: ignore[operator]  # all have one
    kept = {last, *[path for path in older if (path / MANIFEST).exists()][: keep - 1]}
    left_over = [path for path in _entries(folder) if _LEFT_OVER.fullmatch(path.name)]
    for path in (*_checkpoints(folder), *left_over):
        if path not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, or a folder of them, as far as possible; what makes it count first."""
    for manifest in (path / MANIFEST, *path.glob(f"*/{MANIFEST}")):
        try:
            manifest.unlink(missing_ok=True)
        except OSError:
            continue
    shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first, whether they count or not."""
    found = [(place, path) for path in _entries(folder) if (place := place_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return


def _write_manifest(folder: Path, name: str, run: str) -> None:
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"version": 2, "name": name, "run": run, "files": files}, indent=1).encode()
    with open(folder / MANIFEST, "xb") as file:
        file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        file.flush()
        os.fsync(file.fileno())
    _flush(folder)


def _checked(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return a checkpoint's manifest, and why it does not count."""
    try:
        digest, _, text = (path / MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        return {}, f"its manifest cannot be read ({error.strerror})"
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return {}, "its manifest is damaged"
    try:
        manifest: dict[str, Any] = json.loads(text)
        named, files = manifest["name"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        return {}, "its manifest is none of ours"
    if named != path.name:
        return manifest, f"its manifest is that of {named}"
    for name, digest_of_it in files.items():
        try:
            if Path(name).name != name or _digest(path / name) != digest_of_it:
                return manifest, f"{name} is not what was written"
        except OSError as error:
            return manifest, f"{name} cannot be read ({error.strerror})"
    return manifest, None


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _flush(folder: Path) -> None:
    """Flush a folder's entries to the disk, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
