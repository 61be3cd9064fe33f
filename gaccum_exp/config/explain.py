"""Hydra's and OmegaConf's errors as one line that names the nearest valid key or file."""

import re
from pathlib import Path

from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gaccum_exp.config.schema import conf_dir
from gaccum_exp.errors import BadInputError, nearest


def one_line(error: BaseException, arguments: list[str]) -> str | None:
    """Return the error in one line, or None if it is not about the configuration.

    arguments: the command line's, to recompose the configuration that a wrong key was meant for.
    """
    if isinstance(error, BadInputError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value"
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _wrong_key(error, arguments) or _wrong_value(error)
    return None


def _missing_file(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    options = sorted(path.stem for path in (Path(conf_dir()) / group).glob("*.yaml"))
    if not group or not options:
        return _first_line(error)
    return f"{group}={name}: not one of {', '.join(options)}{nearest(name, options)}"


def _wrong_key(error: Exception, arguments: list[str]) -> str | None:
    """An override of a key that does not exist, as against a value that its key does not take."""
    overridden = re.search(
        r"Could not (?:override|append to config|delete from config).*?'(.+?)'", str(error)
    )
    cause = error.__cause__
    if overridden is None or (cause is not None and "not in" not in str(cause)):
        return None
    key = overridden[1].split("@")[0]
    return f"{key}: no such key{nearest(key, _known_keys(arguments))}"


def _wrong_value(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    text = _first_line(cause)
    return f"{key}: {text}" if key and key not in text else text


def _known_keys(arguments: list[str]) -> list[str]:
    """Return every dotted key of the configuration that the arguments' choices of files compose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

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


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
