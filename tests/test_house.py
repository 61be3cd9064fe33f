"""The house keeps its shape: dependencies point one way, and nothing of this machine is left in it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import gaccum_exp
from tests.support import ROOT

PACKAGE = "gaccum_exp"
ROOMS: dict[str, tuple[str, str]] = {
    "errors": ("", ""),
    "core": ("errors", "torch numpy"),
    "memory": ("core errors", "torch"),
    "audit": ("memory core errors", "torch numpy"),
    "integrations": ("audit", "torch lightning transformers pytest"),
    "models": ("errors", "torch torchvision timm transformers peft"),
    "data": ("errors", "torch torchvision sklearn numpy pandas PIL"),
    "optim": ("errors", "torch"),
    "config": ("errors", "hydra omegaconf"),
    "tracking": ("errors", "torch mlflow rich"),
    "report": (
        "tracking.records tracking.metrics audit.result audit.audited_window memory.plan core.dtypes "
        "core.step_times errors",
        "numpy torch matplotlib rich jinja2 markupsafe vl_convert",
    ),
    "train": ("tracking config audit memory core errors", "torch numpy"),
    "arms": (
        "train report tracking config audit memory core errors",
        "torch hydra omegaconf cloudpickle",
    ),
    "api": ("cli arms report core config errors", "torch hydra matplotlib pandas"),
    "cli": ("arms train.stopping tracking config errors __version__", "hydra omegaconf"),
    "__main__": ("cli", ""),
    "__init__": ("api audit memory core errors", ""),
}
"""A room imports from itself, from these rooms or files, and from these packages of others."""

ONE_PLACE = {
    "mlflow": "tracking/mlflow_store.py",
    "rich": "report tracking/progress.py",
    "jinja2": "report/page/write_page.py",
    "vl_convert": "report/page/vega.py",
    "timm": "models/timm.py",
    "transformers": "models/transformers.py integrations",
    "peft": "models/transformers.py",
    "pandas": "data/csv.py api/result.py",
    "cloudpickle": "arms/handed_over.py",
    "hydra.main": "cli.py",
    "hydra.utils.instantiate": "config/targets.py",
}
"""What has one place to be, a file or a room."""


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
    if room not in ROOMS:
        yield "belongs to no room: say in tests/test_house.py what it uses"
        return
    rooms, packages = (names.split() for names in ROOMS[room])
    for name in imported(tree):
        package, _, inside = name.partition(".")
        if package == PACKAGE:
            if not any(f"{inside}.".startswith(f"{used}.") for used in (*rooms, room)):
                yield f"imports {name}"
        elif package not in {*packages, *sys.stdlib_module_names}:
            yield f"imports {package}"
    for name, places in ONE_PLACE.items():
        used = {n for n in (*dotted(tree), *imported(tree)) if n == name or n.startswith(f"{name}.")}
        if used and not any(path.startswith(place) for place in places.split()):
            yield f"uses {name}"


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
        ("core/window.py", "from gaccum_exp.config import schema", "imports gaccum_exp.config.schema"),
        ("core/window.py", "from gaccum_exp.audit.result import Audit", "imports gaccum_exp.audit"),
        ("core/window.py", "def f():\n    import omegaconf", "imports omegaconf"),
        ("config/schema.py", "import torch.nn", "imports torch"),
        ("train/loop.py", "import gaccum_exp.arms.life", "imports gaccum_exp.arms.life"),
        ("train/loop.py", "from hydra.core import hydra_config", "imports hydra"),
        ("train/loop.py", "def f():\n    import lightning", "imports lightning"),
        ("audit/verdict.py", "from gaccum_exp.tracking.sink import Sink", "imports gaccum_exp.tracking"),
        ("memory/plan.py", "import gaccum_exp.audit.result", "imports gaccum_exp.audit.result"),
        ("integrations/due.py", "import hydra", "imports hydra"),
        ("integrations/due.py", "from gaccum_exp.train import loop", "imports gaccum_exp.train.loop"),
        ("models/mlp.py", "from gaccum_exp.core.window import BatchStage", "imports gaccum_exp.core"),
        ("data/fake.py", "import hydra", "imports hydra"),
        ("report/text/table.py", "from gaccum_exp.tracking import sink", "imports gaccum_exp.tracking"),
        ("report/text/table.py", "from hydra import compose", "imports hydra"),
        ("tracking/sink.py", "from gaccum_exp.train import loop", "imports gaccum_exp.train.loop"),
        ("tracking/sink.py", "import mlflow.entities", "uses mlflow"),
        ("arms/life.py", "import rich", "imports rich"),
        ("report/text/table.py", "def f():\n    import vl_convert", "uses vl_convert"),
        ("arms/life.py", "import hydra\n\n@hydra.main()\ndef f(): ...", "uses hydra.main"),
        ("train/state.py", "import hydra\nhydra.utils.instantiate({})", "imports hydra"),
        ("arms/life.py", "from hydra.utils import instantiate", "uses hydra.utils.instantiate"),
        ("models/mlp.py", "def f():\n    import timm", "uses timm"),
        ("data/fake.py", "import pandas", "uses pandas"),
        ("utils.py", "", "belongs to no room"),
    ],
)
def test_a_planted_violation_is_found(path: str, planted: str, said: str) -> None:
    """The check above can fail, for every kind of rule."""
    found = violations({path: planted})
    assert found
    assert said in found[0]


def test_four_files_stand_in_the_root_of_the_package() -> None:
    """Everything else has a room."""
    files = {path for path in sources() if "/" not in path}
    assert files == {"__init__.py", "__main__.py", "cli.py", "errors.py"}


def test_no_room_has_the_name_of_a_public_function() -> None:
    """`from gaccum_exp import watch` is the function, whatever has been imported before."""
    rooms = {path.partition("/")[0] for path in sources() if "/" in path}
    assert not rooms & set(gaccum_exp.__all__)


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
