"""The YAML files of the configuration: where they are, and which there are of a block."""

from collections.abc import Iterable
from pathlib import Path


def conf_dir() -> str:
    """Return the folder of the YAML files: inside an installed package, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def blocks() -> list[str]:
    """Return the names of the blocks that are chosen by a file's name."""
    return sorted(path.name for path in Path(conf_dir()).iterdir() if path.is_dir())


def options(group: str, own_folders: Iterable[str] = ()) -> list[str]:
    """Return the names of a group's files, the program's and those of folders of the user's own."""
    folders = [Path(folder) / group for folder in (conf_dir(), *own_folders)]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml") if path.is_file()})
