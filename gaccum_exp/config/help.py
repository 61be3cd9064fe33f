"""What `--help` says of a block, of a file of it, and of a key: `--help accum model=gpt model.width`."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gaccum_exp.config.files import blocks, conf_dir, options
from gaccum_exp.config.keys import Key, keys, of_block, opening_of
from gaccum_exp.config.schema import BLOCKS
from gaccum_exp.errors import BadInputError, nearest

_WIDEST = 100
_BLOCKS = sorted({*blocks(), *BLOCKS} - {"", "hydra"})


def asked_of(overrides: Sequence[str]) -> list[str]:
    """Return what `--help` is asked about: keys and blocks by their names, and files; not values."""
    return [one for one in overrides if "=" not in one or one.partition("=")[0] in _BLOCKS]


def help_on(asked: Sequence[str], own_folders: Iterable[str] = ()) -> str:
    """Return what there is to say of blocks, files and keys, one after the other.

    Args:
        asked: `accum`, `accum.steps`, `model=gpt`, `model.width`.
        own_folders: in which further files of blocks are.

    Raises:
        BadInputError: there is no such key, block or file.
    """
    folders = (conf_dir(), *own_folders)
    return "\n\n".join("\n".join(_on(one, folders)) for one in dict.fromkeys(asked))


def _on(asked: str, folders: Sequence[str]) -> Iterator[str]:
    name, equals, value = asked.partition("=")
    block, dot, key = name.partition(".")
    if name in keys():
        yield from _lines_of(keys()[name])
    elif equals and name in _BLOCKS:
        yield _file(name, value, folders).read_text(encoding="utf-8").rstrip()
    elif not dot and name in _BLOCKS:
        yield from _on_block(name, folders)
    elif dot and block in _BLOCKS and block not in BLOCKS:
        yield from _in_files(block, key, folders)
    else:
        known = [*keys(), *_BLOCKS]
        raise BadInputError(f"{name}: no such key or block{nearest(name, known)}")


def _lines_of(key: Key) -> Iterator[str]:
    yield key.name
    yield from _wrapped(f"takes {key.takes}; by default {key.default}")
    yield from _wrapped(key.says)


def _on_block(block: str, folders: Sequence[str]) -> Iterator[str]:
    yield f"{block}: {of_block(block)}" if of_block(block) else block
    names = options(block, folders)
    if names not in ([], ["default"]):
        yield f"\nFiles, chosen by {block}=file; --help {block}={names[0]} shows one:"
        for name in names:
            own = not (Path(conf_dir()) / block / f"{name}.yaml").is_file()
            said = "" if own else opening_of(block, name)
            yield from _wrapped(f"{name}: {said}" if said else name)
    for key in keys().values():
        if key.name.startswith(f"{block}."):
            yield ""
            yield from _lines_of(key)


def _in_files(block: str, key: str, folders: Sequence[str]) -> Iterator[str]:
    """Say in which files of an open block a key stands, with its value and the comment beside it."""
    found, known = [], set()
    for name in options(block, folders):
        text = _file(block, name, folders).read_text(encoding="utf-8")
        lines: dict[str, str] = dict(re.findall(r"^([A-Za-z]\w*): *(.*)$", text, re.MULTILINE))
        known |= set(lines)
        if key in lines:
            value, _, comment = lines[key].partition(" # ")
            found += _wrapped(f"{block}={name}: {value.strip()}{comment and f' ({comment.strip()})'}")
    if not found:
        raise BadInputError(
            f"{block}.{key}: in no file of {block}{nearest(key, known)}; what a _target_ takes besides "
            f"is added with + (+{block}.{key}=…)"
        )
    yield f"{block}.{key}, where nothing is said:"
    yield from found


def _file(block: str, name: str, folders: Sequence[str]) -> Path:
    for folder in reversed(folders):
        path = Path(folder) / block / f"{name}.yaml"
        if path.is_file():
            return path
    names = options(block, folders)
    raise BadInputError(f"{block}={name}: not one of {', '.join(names)}{nearest(name, names)}")


def _wrapped(text: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    return textwrap.wrap(
        text, max(width, 40), initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
