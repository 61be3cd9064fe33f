"""Whatever Hydra, OmegaConf, a sweeper or a launcher raises, as a line of key, value and way out."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.config.arguments import WORDS, CommandLine, command_line
from gaccum_exp.config.files import blocks, conf_dir, folder_of, options
from gaccum_exp.errors import (
    BadInputError,
    first_line,
    hide_passwords,
    in_a_line,
    nearest,
    number_of_gib,
    text_of,
)

_HYDRAS = ("hydra", "schema")
_FULL_ERROR = "HYDRA_FULL_ERROR=1 shows where that is from"

PLUGINS = {
    "hydra/launcher": ("joblib", "ray", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("optuna",),
}
"""Files of Hydra's plug-ins that the extra `launchers` brings, by block."""


def one_line(error: BaseException, arguments: Sequence[str]) -> str:
    """Return an error as one line without passwords.

    Args:
        error: what anything between the command line and an arm has raised.
        arguments: the command line's: they hold the value that a key was given, and compose again the
            configuration that a wrong key was meant for.
    """
    return hide_passwords(in_a_line(_explained(error, arguments)))


def _explained(error: BaseException, arguments: Sequence[str]) -> str:
    if isinstance(error, BadInputError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MissingConfigException):
        return _missing(error, arguments)
    said = text_of(error)
    several = re.search(r"Ambiguous value for argument '(.*)'|Sweep parameters '(.*)' requires", said)
    if several:
        given = several[1] or several[2]
        key, _, value = given.partition("=")
        return f"{given}: several values need -m in front; one value that is a list is {key}=[{value}]"
    there = re.search(r"Could not append to config\. An item is already at '(.*)'", said)
    if there:
        given = _given(there[1], arguments)
        return f"{given}: {there[1]} exists already, so leave out the + ({given.lstrip('+')})"
    if "onfig group" in said and not isinstance(error, OmegaConfBaseException):
        return _no_name_of_a_file(said, arguments)
    if "hydra.searchpath must be a list" in said:
        entries = said.rpartition("Got: ")[2]
        return f"hydra.searchpath={entries}: is a list, such as [pkg://my_package.conf,file://my/conf]"
    unavailable = re.search(r"provider=(.*?)(?: in \S+)?, path=(.*) is not available", said)
    if unavailable:
        return _no_such_place(*unavailable.groups())
    cause = error.__cause__
    overridden = re.search(r"Could not (?:override|delete from config).*?'(.+?)'", said)
    # A key that does not exist, as against a value that its key does not take.
    if overridden is not None and (cause is None or "not in" in str(cause)):
        return _no_such_key(overridden[1].split("@")[0], arguments)
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        error = cause
    if isinstance(error, OmegaConfBaseException):
        return of_configuration(error, arguments)
    return _of_any(error, arguments)


def of_configuration(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """Return what is wrong with the value of a key, in the words of OmegaConf."""
    if isinstance(error, RecursionError):
        cyclic = ", ".join(a for a in arguments if "${" in a) or "an interpolation ${...}"
        return f"{cyclic}: refers to itself"
    key, said = getattr(error, "full_key", None), first_line(error)
    missing = re.search(r"while resolving interpolation: Missing mandatory value: (\S+)", said)
    if missing:  # what was not given, and not the key that refers to it
        return f"{missing[1]} must be set"
    if not key:
        named = " ".join(a for a in arguments if "${" in a)
        return f"{named}: {said}" if named else f"{_suspects(arguments)}{said}"
    at, said = _given(str(key), arguments), said.replace("Missing mandatory value", "must be set")
    amount = number_of_gib(at.partition("=")[2]) if str(key).endswith("_gib") else None
    if amount is not None:
        return f"{at}: is a number of GiB ({amount})"
    return said if said.startswith(at) else f"{at}: {said}"


def _unreadable(error: OverrideParseException) -> str:
    given = error.override
    why = "cannot be read as key=value"
    if "=" not in given:
        return f"{given or repr(given)}: {why}{nearest(given, WORDS) or '; --help shows what there is'}"
    said = error.message.splitlines()
    # The parser's own words are about its grammar; those of functions (`range`, `int`) are plain.
    told = f" ({said[1]})" if len(said) > 2 and said[0].startswith("Error parsing override") else ""
    return f"{given}: {why}{told}; quote a value that holds blanks, commas or brackets: \"key='value'\""


def _missing(error: MissingConfigException, arguments: Sequence[str]) -> str:
    path = str(error.missing_cfg_file or "")
    words = [(a.partition("=")[0].lstrip("+~"), a.partition("=")[2]) for a in arguments]
    chosen = next(((key, value) for key, value in words if f"{key}/{value}" == path), None)
    group, name = chosen or path.rpartition("/")[::2]
    if not group and "primary config" in first_line(error):
        return f"{_suspects(arguments)}{_no_primary(path, arguments)}"
    folders = own_folders(arguments)
    known = sorted({*options(group, folders), *(error.options or ())})
    if not group or not known:
        return f"{_suspects(arguments)}{first_line(error)}"
    line = f"{group}={name}: not one of {', '.join(known)}"
    if group == "model" and name.lower() in _torchvision_names():
        return f"{line}; torchvision's is model=torchvision model.name={name}"
    ending_in_yml = [yml for f in folders if (yml := Path(f, group, f"{name}.yml")).is_file()]
    if ending_in_yml:
        return f"{group}={name}: Hydra reads files that end in .yaml: rename {ending_in_yml[0]}"
    if name in PLUGINS.get(group, ()):
        return f"{line}; {name} needs pip install 'gaccum_exp[launchers]'"
    return line + nearest(name, known)


def _no_primary(name: str, arguments: Sequence[str]) -> str:
    """Say which files a command can begin with."""
    folders = [Path(folder) for folder in own_folders(arguments)]
    if "--config-path" not in command_line(arguments).flags:
        folders.append(Path(conf_dir()))
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    missing = f"there is no {name}.yaml in {', '.join(map(str, folders))}"
    if not known:
        return f"{missing}; to put files beside the program's, give --config-dir instead"
    return f"{missing}; --config-name is one of {', '.join(known)}{nearest(name, known)}"


def _no_such_place(provider: str, path: str) -> str:
    """Say of an entry of Hydra's search path why nothing can be read there."""
    if "/" in path:
        return f"{provider}: there is no folder {path}"
    folder = folder_of(f"pkg://{path}")
    if folder is None:
        return f"{provider}: there is no package {path} that can be imported (a folder is file://…)"
    return f"{provider}: Hydra reads pkg://{path} only with a file __init__.py in {folder}"


def _torchvision_names() -> set[str]:
    """Return the names of torchvision's models, without the seconds that importing it takes."""
    found = importlib.util.find_spec("torchvision")
    folders = [Path(p) / "models" for p in (found.submodule_search_locations or ())] if found else []
    registered = re.compile(r"@register_model\(.*\)\n(?:@.*\n)*def (\w+)\(")
    return {
        name
        for folder in folders
        for path in folder.rglob("*.py")
        for name in registered.findall(path.read_text(encoding="utf-8"))
    }


def _no_name_of_a_file(said: str, arguments: Sequence[str]) -> str:
    """Say that a block is chosen by a file's name, which null, a number and a list are not."""
    for given in arguments:
        group, value = _group_of(given), given.partition("=")[2]
        if group in blocks() and value not in options(group, own_folders(arguments)):
            known = ", ".join(options(group, own_folders(arguments)))
            return f"{given}: takes the name of a file: {known}"
    return f"{_suspects(arguments)}{said.splitlines()[0]}"


def _no_such_key(key: str, arguments: Sequence[str]) -> str:
    if key in blocks():
        return (
            f"{key}: takes the name of a file ({key}=custom); set values one by one ({key}.x=value, "
            "with + in front where it is new), or write a file of your own (--config-dir)"
        )
    known = _known_keys(arguments)
    given = _given(key, arguments)
    if key in known and given.partition("=")[2].startswith("{"):
        return f"{given}: gives {key} keys that it has not; a new one has + in front (+{key}.x=value)"
    if key in known:  # Hydra says so of one that is null and to be taken away
        return f"{given}: {key} is null already, so leave that out"
    near = nearest(key, [other for other in known if other.count(".") == key.count(".")])
    is_new = not near and "." in key and key.partition(".")[0] in blocks() and "=" in given
    return f"{key}: no such key{near}" + (f"; a new one has + in front (+{given})" if is_new else "")


def _of_any(error: BaseException, arguments: Sequence[str]) -> str:
    """Say of an error that nobody has foreseen what it says, and what may have caused it."""
    mark: Any = getattr(error, "problem_mark", None)  # of a file in YAML
    if mark is not None:
        return f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', None) or 'is not YAML'}"
    if isinstance(error, UnicodeDecodeError):
        files = [p for f in own_folders(arguments) for p in Path(f).rglob("*.yaml") if not _is_utf8(p)]
        files.sort(key=lambda path: f"{path.parent.name}={path.stem}" not in arguments)
        if files:
            return f"{files[0]}: is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        kind, said = type(error).__name__, first_line(error)
        said = said if said == kind or isinstance(error, HydraException) else f"{kind}: {said}"
    key = re.search(r"full_key: (\S+)", text_of(error))
    at = f"{_given(key[1], arguments)}: " if key else _suspects(arguments)
    return f"{at}{said}; {_FULL_ERROR}"


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    except OSError:  # not a file
        return True
    return True


def _given(key: str, arguments: Sequence[str]) -> str:
    """Return the override of a key as the command line has it last; the key alone where it has none."""
    return next((a for a in reversed(arguments) if a.partition("=")[0].lstrip("+~") == key), key)


def _suspects(arguments: Sequence[str]) -> str:
    """Return what of a command line may be at fault where an error names nothing, in front of a colon.

    What it says of Hydra itself, which else runs as it is set up here; else the blocks it chooses; else
    all of it.
    """
    line = command_line(arguments)
    said = [f"{k}={v}" if v else k for k, v in line.flags.items() if k != "--multirun"]
    said += [o for o in line.overrides if o.lstrip("+~").startswith("hydra")]
    groups = [o for o in line.overrides if _group_of(o) in blocks()]
    named = [*said, *groups] or line.overrides
    return f"{' '.join(named)}: " if named else ""


def _group_of(override: str) -> str:
    return override.partition("=")[0].partition("@")[0].lstrip("+~")


def own_folders(arguments: Sequence[str]) -> list[str]:
    """Return the folders of configurations beside the program's: of a command line, and of plugins."""
    line = command_line(arguments)
    flags = [line.flags.get(flag) for flag in ("--config-dir", "--config-path")]
    of_plugins = [
        of.path for of in create_config_search_path(None).get_path() if of.provider not in _HYDRAS
    ]
    entries = [entry for entry in (*flags, *_search_path(line), *of_plugins) if entry]
    return [folder for entry in entries if (folder := folder_of(entry)) is not None]


def _search_path(line: CommandLine) -> list[str]:
    """Return the entries of `hydra.searchpath=[…]`."""
    given = next((o for o in line.overrides if o.startswith("hydra.searchpath=")), "")
    entries = given.partition("=")[2].strip("[]").split(",")
    return [entry.strip(" '\"") for entry in entries if entry.strip()]


def _known_keys(arguments: Sequence[str]) -> list[str]:
    """Return every dotted key of the configuration that the arguments' choices of files compose."""
    folders = blocks()
    choices = [a for a in arguments if a.split("=")[0] in folders and "," not in a]
    own = [f"file://{Path(folder).absolute()}" for folder in own_folders(arguments)]
    choices += [f"hydra.searchpath=[{','.join(map(repr, own))}]"] if own else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        try:
            cfg = compose("config", choices)
        except Exception:  # another thing is wrong with these
            cfg = compose("config")
    return list(_dotted(cfg)) + folders


def _dotted(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in map(str, node):
        name = f"{prefix}{key}"
        keys.append(name)
        child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += _dotted(child, f"{name}.")
    return keys
