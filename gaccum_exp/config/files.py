"""The YAML files of the configuration: where they are, and which there are of a block."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

OURS = "gaccum_exp.conf"
"""The folder of the YAML files as a package, for the search path of another project (`pkg://…`)."""


def conf_dir() -> str:
    """Return the folder of the YAML files: inside an installed package, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"  # in a checkout a link, for the sake of `pkg://gaccum_exp.conf`
    return str(inside.resolve() if inside.is_dir() else package.parent / "conf")


def blocks() -> list[str]:
    """Return the names of the blocks that are chosen by a file's name."""
    folders = (path.name for path in Path(conf_dir()).iterdir() if path.is_dir())
    return sorted(name for name in folders if not name.startswith("_"))


def options(group: str, own_folders: Iterable[str] = ()) -> list[str]:
    """Return the names of a group's files, the program's and those of folders of the user's own."""
    folders = [Path(folder) / group for folder in (conf_dir(), *own_folders)]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml") if path.is_file()})


def folder_of(entry: str) -> str | None:
    """Return the folder that an entry of Hydra's search path names; None where there is none."""
    scheme, _, place = entry.rpartition("://")
    if scheme != "pkg":
        return place if scheme in ("", "file") and Path(place).is_dir() else None
    try:
        found = importlib.util.find_spec(place.replace("/", "."))
    except (ImportError, ValueError):
        return None
    return next(iter(found.submodule_search_locations or ()), None) if found else None
