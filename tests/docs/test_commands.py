"""The commands on the pages are commands that the program takes.

All are composed and validated, the first and the last arm of a sweep, with the template's files beside
the program's, and a stranger's package where a placeholder stands; two are run. `make test-docs` runs
every one as it stands (test_as_written.py).
"""

import re
import shlex
import shutil

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from gaccum_exp.config.arguments import WORDS, command_line
from tests.docs.shown import PAGES, blocks
from tests.program import Program, sweep_here
from tests.support import ROOT, settings

START = "python -m gaccum_exp"
TEMPLATE = ROOT / "docs/template/my_project"
FOUND = f"hydra.searchpath=[file://{TEMPLATE / 'conf'}]"
"""As by the template's plugin."""
STRANGERS = {
    "my_pkg.Net": "tests.strangers.Net",
    "my_pkg.Points": "tests.strangers.Points",
    "SWEEP_ID": "20261129-104952-93a4ac",
    "HOST": "127.0.0.1",
}
"""What a reader puts their own in place of."""
COMMANDS = list(
    dict.fromkeys(
        (block.page, " ".join(line.split()))
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh" and block.mark is None
        for line in block.commands
        if line.startswith(START)
    )
)
"""Every command line in a block for the shell, with its page."""
WHERE = re.compile(r" --config|searchpath=")
IN_A_PROJECT = [line for _, line in COMMANDS if WHERE.search(line) or "two_terms" in line]
"""Those that say where configurations are, or need one that the page has shown."""


def arguments(command: str) -> list[str]:
    """Return what stands behind the program's name, with strangers in place of placeholders."""
    for placeholder, own in STRANGERS.items():
        command = command.replace(placeholder, own)
    return shlex.split(command.removeprefix(START), comments=True)


@pytest.mark.parametrize(
    ("page", "command"),
    [of for of in COMMANDS if of[1] not in IN_A_PROJECT],
    ids=lambda text: text[:60],
)
def test_a_command_of_a_page_is_a_configuration(page: str, command: str) -> None:
    """Its first arm and its last; a word, as `report`, is one that there is."""
    given = arguments(command)
    if given[:1] in [[word] for word in WORDS]:
        return
    line = command_line(given)
    if line.only_shows:
        return
    overrides = [one for one in line.overrides if not one.lstrip("+").startswith("hydra")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    for which in (0, -1) if line.multirun else (0,):
        assert settings(FOUND, *(arm for one in parsed if (arm := of_arm(one, which))))


def of_arm(override: Override, which: int) -> str:
    """Return what an override gives to one arm; nothing where a sweeper chooses from an interval."""
    if not override.is_sweep_override():
        return str(override.input_line)
    if not override.is_discrete_sweep():
        return ""
    return f"{override.get_key_element()}={[*override.sweep_string_iterator()][which]}"


def test_the_pages_have_their_commands() -> None:
    """Otherwise the test above would pass on nothing."""
    assert len(COMMANDS) >= 60
    pages = {page for page, _ in COMMANDS}
    assert {"docs/howto/going_on.md", "docs/howto/own_project.md", "docs/template/README.md"} <= pages


def test_the_commands_with_folders_of_ones_own_can_be_composed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the template, with the study that the page prints."""
    shutil.copytree(TEMPLATE, program.folder / "my_project")
    (program.folder / "conf").mkdir()
    for block in blocks(ROOT / "docs/howto/own_project.md"):
        if block.mark == "file":
            path = program.folder / str(block.said)
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
    monkeypatch.syspath_prepend(program.folder)
    assert len(IN_A_PROJECT) == 4
    for command in IN_A_PROJECT:
        one_arm = [word.partition(",")[0] for word in arguments(command) if word != "-m"]
        plugin = () if WHERE.search(command) else ("hydra.searchpath=[pkg://my_project.conf]",)
        ended = program(*one_arm, *plugin, "--cfg=job")
        assert ended.status == 0, ended.plain


RUN = {
    "docs/howto/going_on.md": (0, ("model=mlp", "train.steps=2")),
    "docs/howto/audit_gate.md": (0, ()),
}
"""Pages, which of their commands is run, and what is put behind it."""


@pytest.mark.parametrize("page", RUN)
def test_a_command_of_a_page_runs_as_it_stands(
    page: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, to its end."""
    sweep_here(monkeypatch)
    which, more = RUN[page]
    command = [command for of, command in COMMANDS if of == page][which]
    ended = program(*arguments(command), *more, "runtime.device=cpu")
    assert ended.status == 0, ended.plain


@pytest.mark.parametrize(("script", "status"), [("train.py", 3), ("train_right.py", 0)])
def test_the_scripts_of_the_tutorial_get_the_answers_that_it_shows(
    script: str, status: int, program: Program
) -> None:
    """Under `check`: verdict, cause, what each micro-batch counts, and where it did not look."""
    page = " ".join((ROOT / "docs/tutorial/index.md").read_text(encoding="utf-8").split())
    assert f"gaccum_exp check docs/tutorial/{script}" in page
    ended = program.as_given("check", str(ROOT / "docs/tutorial" / script))
    assert ended.status == status
    answer = re.search(
        r"(biased|equivalent) \(N = 4.*?(whole window counts|projected on it 1)\b", ended.plain
    )
    assert answer
    assert without_rounding(answer[0]) in without_rounding(page)
    assert "57 micro-batches are no multiple of N = 4: 1 is left over" in ended.plain


def without_rounding(text: str) -> str:
    """Return what was said without the numbers that another machine rounds otherwise."""
    return re.sub(r"\b(off by|float64:|alone:) [\d.e+-]+", r"\1", text)
