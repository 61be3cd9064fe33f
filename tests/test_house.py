"""The house keeps its shape: dependencies point one way, and nothing of this machine is left in it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = "gaccum_exp"
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors records clock optim schedule tracking_ui targets",
        "core batch metrics models data",
        "config",
        "memory audit experiment tracking progress explain runtime first_samples datasets",
        "sink tracking_process",
        "evaluate provenance sweep report",
        "build certify compiled meters guard integrations",
        "train",
        "planning stacked",
        "stackable",
        "arm",
        "seeds",
        "cli",
        "__main__",
    )
)
"""From the ground up: a room imports from the layers below its own, and from itself."""

NARROWER: dict[str, frozenset[str]] = {
    "core": frozenset({"errors"}),
    "batch": frozenset({"errors"}),
    "config": frozenset({"batch", "errors"}),
    "audit": frozenset({"core", "errors"}),
    "integrations": frozenset({"audit"}),
    "models": frozenset({"errors"}),
    "data": frozenset({"errors"}),
    "memory": frozenset({"core"}),
    "tracking": frozenset({"errors", "records"}),
    "tracking_process": frozenset({"errors", "tracking"}),
    "sink": frozenset({"metrics", "records", "tracking"}),
    "tracking_ui": frozenset(),
    "targets": frozenset({"errors"}),
    "datasets": frozenset({"core", "errors", "targets"}),
    "explain": frozenset({"config", "errors"}),
}
"""Rooms that may use less of what lies below them."""

OUTSIDE: dict[str, frozenset[str]] = {
    "core": frozenset({"torch", "numpy"}),
    "audit": frozenset({"torch", "numpy"}),
    "integrations": frozenset({"torch", "lightning", "transformers", "pytest"}),
    "batch": frozenset(),
    "certify": frozenset(),
    "config": frozenset({"hydra", "omegaconf"}),
    "explain": frozenset({"hydra", "omegaconf"}),
    "cli": frozenset({"hydra", "omegaconf"}),
    "sweep": frozenset({"hydra", "omegaconf"}),
    "memory": frozenset({"torch"}),
    "train": frozenset({"torch"}),
    "report": frozenset({"numpy", "torch", "matplotlib", "rich"}),
    "models": frozenset({"torch", "torchvision"}),
    "data": frozenset({"torch", "torchvision", "sklearn", "numpy"}),
    "errors": frozenset(),
    "records": frozenset(),
    "tracking": frozenset({"mlflow"}),
    "tracking_process": frozenset(),
    "tracking_ui": frozenset(),
    "targets": frozenset({"hydra"}),
    "datasets": frozenset({"torch"}),
}
"""Rooms that use only these packages of others."""

ONLY_IN: dict[str, frozenset[str]] = {
    "mlflow": frozenset({"tracking"}),
    "matplotlib": frozenset({"report"}),
    "rich": frozenset({"report", "progress"}),
    "lightning": frozenset({"integrations"}),
    "transformers": frozenset({"integrations"}),
    "pytest": frozenset({"integrations"}),
}
"""Packages with one place to be."""

ONE_PLACE = {"hydra.main": "cli.py", "hydra.utils.instantiate": "targets.py"}


def sources() -> dict[str, str]:
    """Return every module's text by its path inside the package."""
    folder = ROOT / PACKAGE
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}


def violations(modules: Mapping[str, str]) -> list[str]:
    """Return a line for every import and every call that has no business where it stands."""
    return [
        f"{path}: {fault}" for path, text in modules.items() for fault in faults(path, ast.parse(text))
    ]


def faults(path: str, tree: ast.Module) -> Iterator[str]:
    """Judge one module, imports inside functions included."""
    room = path.partition("/")[0].removesuffix(".py")
    if room != "__init__" and not any(room in layer for layer in LAYERS):
        yield "belongs to no layer: say in tests/test_house.py where it stands"
        return
    for name in imported(tree):
        package, _, rest = name.partition(".")
        if package == PACKAGE:
            yield from _house_fault(path, room, rest.partition(".")[0])
        elif package not in sys.stdlib_module_names:
            allowed, rooms = OUTSIDE.get(room), ONLY_IN.get(package)
            if (allowed is not None and package not in allowed) or (rooms and room not in rooms):
                yield f"imports {package}"
    for name in set(dotted(tree)) | set(imported(tree)):
        if name in ONE_PLACE and path != ONE_PLACE[name]:
            yield f"uses {name}"


def _house_fault(path: str, room: str, other: str) -> Iterator[str]:
    if other in (room, "") or room == "__init__":  # the root only passes on what the core exports
        return
    if room == "report" and other == "tracking" and path != "report/__main__.py":
        yield "imports tracking: reports are made of records, wherever those come from"
    below = [layer for layer in LAYERS if room not in layer][: _layer(room)]
    allowed = NARROWER.get(room, frozenset().union(*below))
    if other not in allowed:
        yield f"imports {PACKAGE}.{other}"


def _layer(room: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if room in layer)


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield dotted names of what is imported; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(tree: ast.Module) -> Iterator[str]:
    """Yield every attribute access as written, e.g. `hydra.utils.instantiate`."""
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def files_of_the_project() -> list[Path]:
    """Return what is or will be under version control, as far as it is text."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    binary = {".png", ".svg", ".pt"}
    paths = (ROOT / line for line in done.stdout.splitlines())
    return [path for path in paths if path.is_file() and path.suffix not in binary]


def test_no_import_runs_against_the_houses_direction() -> None:
    """Each room uses the layers below it and the packages that are its own."""
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "planted", "said"),
    [
        ("core/window.py", "import mlflow", "imports mlflow"),
        ("core/window.py", "from gaccum_exp.config import Settings", "imports gaccum_exp.config"),
        ("core/window.py", "from gaccum_exp import metrics", "imports gaccum_exp.metrics"),
        ("core/window.py", "def f():\n    import omegaconf", "imports omegaconf"),
        ("config.py", "import torch.nn", "imports torch"),
        ("train.py", "from mlflow import MlflowClient", "imports mlflow"),
        ("train.py", "import gaccum_exp.arm", "imports gaccum_exp.arm"),
        ("audit/window.py", "from gaccum_exp.config import Settings", "imports gaccum_exp.config"),
        ("audit/window.py", "from gaccum_exp.metrics import Sink", "imports gaccum_exp.metrics"),
        ("audit/window.py", "import mlflow", "imports mlflow"),
        ("core/window.py", "from gaccum_exp.audit.result import Audit", "imports gaccum_exp.audit"),
        ("certify.py", "from gaccum_exp.train import train", "imports gaccum_exp.train"),
        ("certify.py", "import rich", "imports rich"),
        ("integrations/due.py", "import hydra", "imports hydra"),
        ("integrations/due.py", "from gaccum_exp.train import train", "imports gaccum_exp.train"),
        ("train.py", "def f():\n    import lightning", "imports lightning"),
        ("models/mlp.py", "from gaccum_exp.core.loss import LossFn", "imports gaccum_exp.core"),
        ("data/fake.py", "import hydra", "imports hydra"),
        ("report/compare.py", "from gaccum_exp.tracking import Store", "imports tracking"),
        ("report/table.py", "from hydra import compose", "imports hydra"),
        ("tracking.py", "from gaccum_exp.train import train", "imports gaccum_exp.train"),
        ("arm.py", "import hydra\n\n@hydra.main()\ndef f(): ...", "uses hydra.main"),
        ("arm.py", "from hydra.utils import instantiate", "uses hydra.utils.instantiate"),
        ("experiment.py", "import hydra\nhydra.utils.instantiate({})", "uses hydra.utils.instantiate"),
        ("utils.py", "", "belongs to no layer"),
    ],
)
def test_a_planted_violation_is_found(path: str, planted: str, said: str) -> None:
    """The check above can fail, for every kind of rule."""
    found = violations({path: planted})
    assert found
    assert said in found[0]


def test_every_test_says_what_it_claims() -> None:
    """A docstring on each test function, here and in the folders below."""
    silent = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_file_holds_an_index_address_or_a_path_of_one_machine() -> None:
    """What installs, installs from wherever the user's pip is told to."""
    # Put together here, so that this file does not find itself.
    folders = "|".join(("wo" + "rk", "ro" + "ot", "tm" + "p"))
    telling = re.compile(
        rf"(?<![\w.~])/(?:{folders})/|--(?:extra-)?index-ur[l]|/simpl[e]/?\b|py[p]i\.org"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files_of_the_project()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if telling.search(line)
    ]
    assert found == []


def test_a_stranger_finds_where_to_begin() -> None:
    """README, changelog, how to contribute, licence; and the first recipe is the one that works."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        assert (ROOT / name).read_text().strip()
    assert "make demo" in (ROOT / "README.md").read_text()
