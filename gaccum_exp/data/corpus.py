"""Read a text's documents from files or from Python's own library, and split them into two parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gaccum_exp.errors import BadInputError


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as it was read."""

    documents: tuple[str, ...]
    """At least one, none of them blank."""
    characters: tuple[str, ...]
    """Every character of them, and of the separator that may join them, in the order of Unicode."""


def read_corpus(root: str | None, separator: str) -> Corpus:
    """Return the documents of a file, a folder, or of Python's reference.

    Args:
        root: a UTF-8 file, of which every part between separators is a document; or a folder, of
            which every file is, in the order of the paths below it, hidden ones left out; or None,
            for the entries of `pydoc_data.topics`, in the order of their names.
        separator: what stands between documents; empty: a file is one document.

    Blank documents are left out, and line ends become line feeds. The corpus read last is kept for the
    other split. Raises `BadInputError` where there is nothing to read, or something not in UTF-8.
    """
    if root is None:
        return _reference(separator)
    path = Path(root).expanduser()
    try:
        if path.is_dir():
            below = sorted(path.rglob("*"), key=lambda found: found.relative_to(path).as_posix())
            files = tuple(
                _stamped(found)
                for found in below
                if found.is_file() and not any(p.startswith(".") for p in found.relative_to(path).parts)
            )
            return _read(path, files, separator, one_each=True)
        return _read(path, (_stamped(path),), separator, one_each=False)
    except FileNotFoundError:
        raise BadInputError(
            f"data.root={root}: there is no file or folder {path.resolve()}; give a UTF-8 text or a "
            "folder of them, or null for Python's own reference"
        ) from None
    except OSError as error:
        raise BadInputError(f"data.root={root}: cannot be read ({error})") from error


def hold_out(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Return documents to train on and, of about `fraction` of all characters, to evaluate on.

    No seed enters: from the longest document to the shortest, each is held out if that brings the
    part held out so far nearer to the fraction of what has been seen so far. So both parts have long
    and short ones, and where there are two documents, both have at least one. A single document is
    cut, and its end held out. Both parts keep the documents' order. A fraction of 0 holds out none.
    """
    if fraction == 0:
        return list(documents), []
    if len(documents) == 1:
        (whole,) = documents
        cut = max(1, min(len(whole) - 1, round(len(whole) * (1 - fraction))))
        return [whole[:cut]], [whole[cut:]]
    by_length = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    held: set[int] = set()
    missing = 0.0
    for index in by_length:
        missing += fraction * len(documents[index])
        if missing > len(documents[index]) / 2:
            held.add(index)
            missing -= len(documents[index])
    if len(held) in (0, len(documents)):
        held ^= {by_length[-1]}
    train = [document for index, document in enumerate(documents) if index not in held]
    return train, [documents[index] for index in sorted(held)]


def parts(document: str, separator: str) -> list[str]:
    """Return what stands between the separators, blank parts left out; all of it if there is none."""
    found = document.split(separator) if separator else [document]
    return [part for part in found if part.strip()]


def _stamped(path: Path) -> tuple[Path, int, int]:
    state = path.stat()  # a file that has changed since is read again
    return path, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=1)
def _reference(separator: str) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        raise BadInputError(
            "data.root=null: this Python comes without its reference (pydoc_data.topics), so set "
            "data.root to a UTF-8 file or a folder of them"
        ) from None
    return _corpus([topics[name] for name in sorted(topics)], separator)


@lru_cache(maxsize=1)
def _read(
    root: Path, files: tuple[tuple[Path, int, int], ...], separator: str, one_each: bool
) -> Corpus:
    documents = [_decoded(path) for path, *_ in files]
    if not one_each:
        documents = parts(documents[0], separator)
    if not any(document.strip() for document in documents):
        read = f"{len(files)} files, hidden ones left out" if one_each else "a blank file"
        raise BadInputError(f"data.root={root}: holds no text ({read})")
    return _corpus(documents, separator)


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"data.root: {path} is not UTF-8 (byte {error.object[error.start]:#04x} at "
            f"{error.start}): convert it, or take it out of the folder"
        ) from None


def _corpus(documents: Sequence[str], separator: str) -> Corpus:
    filled = tuple(document for document in documents if document.strip())
    joining = [separator] if len(filled) > 1 else []
    return Corpus(filled, tuple(sorted(set().union(*filled, *joining))))
