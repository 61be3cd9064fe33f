"""Every key of the schema, as the schema itself describes it: for `--help`, and for the reference."""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, get_args

from omegaconf import OmegaConf

from gaccum_exp.config import batch_sizes, schema
from gaccum_exp.config.allowed import Choices, allowed_of
from gaccum_exp.config.files import conf_dir, options

_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}
_EXAMPLE = re.compile(r"\s*['+]?[\w.]+=")


@dataclass(frozen=True, slots=True)
class Key:
    """One key: what it takes, what it is where nothing is said, and what it does."""

    name: str
    """Dotted."""
    takes: str
    """Its type, and the values of that which are allowed."""
    default: str
    says: str


@cache
def keys() -> dict[str, Key]:
    """Return all keys whose names the schema knows, by block in its order, those of the root last."""
    found: list[Key] = []
    for block in fields(schema.Config):
        if block.name == "data":
            found += _of_data()
        elif is_dataclass(block.type):
            found += _of_class(schema, block.type, f"{block.name}.")
    return {key.name: key for key in [*found, *_of_class(schema, schema.Config, "")]}


def attribute_docs(module: ModuleType, of_class: str | None = None) -> dict[str, str]:
    """Return the docstrings below a module's constants and functions, or below a class's attributes.

    Python keeps none of an attribute, so the source is read.
    """
    body = ast.parse(inspect.getsource(module)).body
    if of_class is not None:
        (found,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == of_class)
        body = found.body
    docs: dict[str, str] = {}
    for node, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.FunctionDef):
            docs[node.name] = ast.get_docstring(node) or ""
        name = _assigned(node)
        if name and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[name] = inspect.cleandoc(str(below.value.value))
    return docs


def sentence(text: str) -> str:
    """Return a docstring's first paragraph on one line."""
    return " ".join(text.partition("\n\n")[0].split())


def of_block(block: str) -> str:
    """Return what a block is about, in a sentence."""
    kind = schema.BLOCKS.get(block)
    text = kind.__doc__ if kind else attribute_docs(schema, "Config").get(block)
    return sentence(text or "")


def comment_of(group: str, name: str) -> str:
    """Return the comment that opens a file of the configuration: what it chooses."""
    lines: list[str] = []
    for line in (Path(conf_dir()) / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("# @package"):
            if lines:
                break
            continue
        lines.append(line[1:].rstrip())
    return inspect.cleandoc("\n".join(lines))


def opening_of(group: str, name: str) -> str:
    """Return the first sentence of that comment on one line; an example ends it."""
    lines = takewhile(lambda line: not _EXAMPLE.match(line), comment_of(group, name).splitlines())
    text = " ".join(line.strip() for line in lines)
    found = re.match(r".*?[.?](?= [A-Z]|$)", text)
    return (found[0] if found else text).removesuffix(", e.g.").rstrip(":")


def _assigned(node: ast.stmt) -> str | None:
    """Return the name that a statement gives a value to."""
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def _of_class(module: ModuleType, kind: Any, prefix: str) -> Iterator[Key]:
    docs = attribute_docs(module, kind.__name__)
    for one in fields(kind):
        if not is_dataclass(one.type) and getattr(one.type, "__origin__", None) is not dict:
            says = sentence(docs[one.name])
            yield Key(f"{prefix}{one.name}", _takes(one), _said(one.default), says)


def _of_data() -> Iterator[Key]:
    """Describe the keys of `data` that are the same in all of its files, with the defaults there."""
    docs = attribute_docs(batch_sizes, "DataConfig")
    folder = Path(conf_dir()) / "data"
    blocks = {name: OmegaConf.load(folder / f"{name}.yaml") for name in options("data")}
    for one in fields(batch_sizes.DataConfig):
        if one.name == "block":
            continue
        if one.name in ("train", "eval"):
            yield Key(f"data.{one.name}", "mapping", "by file", sentence(docs[one.name]))
            continue
        files: dict[str, list[str]] = {}
        for name, block in blocks.items():
            assert isinstance(block, Mapping)
            files.setdefault(_said(block.get(one.name, False)), []).append(name)
        usual = max(files, key=lambda value: len(files[value]))
        others = [f"{value} ({', '.join(names)})" for value, names in files.items() if value != usual]
        yield Key(f"data.{one.name}", _takes(one), ", ".join([usual, *others]), sentence(docs[one.name]))


def _takes(one: "Field[Any]") -> str:
    allowed, kind = allowed_of(one), one.metadata.get("kind", "")
    if isinstance(allowed, Choices):
        return str(allowed)
    if not kind and one.type is Any:
        return str(allowed)
    if not kind:
        kind = " or ".join(_KINDS[part] for part in get_args(one.type) or (one.type,))
    return f"{kind}: {allowed}" if allowed is not None else kind


def _said(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is MISSING:
        return "–"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
