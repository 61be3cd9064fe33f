"""Hydra's and OmegaConf's errors as one line that names the nearest valid key or file."""

import re
from itertools import pairwise
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.config.schema import conf_dir
from gaccum_exp.errors import BadInputError, first_line, hide_passwords, nearest


def one_line(error: BaseException, arguments: list[str]) -> str | None:
    """Return the error in one line without passwords, or None if it is not about the configuration.

    Args:
        error: what Hydra, OmegaConf or this program has raised.
        arguments: the command line's, to compose again the configuration that a wrong key was meant for.
    """
    line = _explained(error, arguments)
    return None if line is None else hide_passwords(line)


def _explained(error: BaseException, arguments: list[str]) -> str | None:
    if isinstance(error, BadInputError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value"
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file or "").rpartition("/")
        folders = [Path(folder) / group for folder in (conf_dir(), *_own_folders(arguments))]
        options = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        if not group or not options:
            return first_line(error)
        return f"{group}={name}: not one of {', '.join(options)}{nearest(name, options)}"
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    cause = error.__cause__
    pattern = r"Could not (?:override|append to config|delete from config).*?'(.+?)'"
    overridden = re.search(pattern, str(error))
    # A key that does not exist, as against a value that its key does not take.
    if overridden is not None and (cause is None or "not in" in str(cause)):
        key = overridden[1].split("@")[0]
        if (Path(conf_dir()) / key).is_dir():
            return (
                f"{key}: takes the name of a file ({key}=custom); set values one by one ({key}.x=value, "
                "with + in front where it is new), or write a file of your own (--config-dir)"
            )
        return f"{key}: no such key{nearest(key, _known_keys(arguments))}"
    deepest = cause if isinstance(cause, OmegaConfBaseException) else error
    full_key, text = getattr(deepest, "full_key", None), first_line(deepest)
    return f"{full_key}: {text}" if full_key and full_key not in text else text


def _own_folders(arguments: list[str]) -> list[str]:
    """Return the folders of configurations that the command line adds to the program's."""
    flags = ("--config-dir", "-cd")
    after = [value for flag, value in pairwise(arguments) if flag in flags]
    return after + [
        a.partition("=")[2] for a in arguments if a.startswith(tuple(f"{f}=" for f in flags))
    ]


def _known_keys(arguments: list[str]) -> list[str]:
    """Return every dotted key of the configuration that the arguments' choices of files compose."""
    folders = {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()}
    choices = [a for a in arguments if a.split("=")[0] in folders and "," not in a]
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        try:
            cfg = compose("config", choices)
        except (HydraException, OmegaConfBaseException):
            cfg = compose("config")
    return list(_dotted(cfg)) + sorted(folders)


def _dotted(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in map(str, node):
        name = f"{prefix}{key}"
        keys.append(name)
        child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += _dotted(child, f"{name}.")
    return keys
