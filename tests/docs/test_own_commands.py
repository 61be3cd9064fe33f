"""The commands of the pages on what is one's own are configurations, with the template beside them."""

import re
import shlex
import shutil

import pytest
from hydra import compose, initialize_config_dir

from gaccum_exp.config import schema
from tests.program import Program
from tests.support import ROOT

HOWTO = [
    shlex.split(line.replace("\\\n", " "))
    for page in sorted((ROOT / "docs/howto").glob("own_[dp]*.md"))
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^python -m gaccum_exp ((?:.*\\\n)*.*)$", block, re.MULTILINE)
]
"""The commands of the pages on what is one's own; what they name of a project is the template's."""
TEMPLATE = ROOT / "docs/template/my_project"


def test_the_commands_on_what_is_ones_own_can_be_composed() -> None:
    """Each one's first arm and its last, with the template's files beside the program's."""
    schema.register()
    commands = [words for words in HOWTO if not any(word.startswith("--") for word in words)]
    assert len(commands) > 15
    with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
        for words in commands:
            pairs = [word.partition("=") for word in words if word != "-m" and "searchpath" not in word]
            for which in (0, -1) if "-m" in words else (0,):
                arm = [
                    f"{key}={value if value[:1] in '[{' else value.split(',')[which]}"
                    for key, _, value in pairs
                ]
                found = f"hydra.searchpath=[file://{TEMPLATE / 'conf'}]"  # as by the template's plugin
                assert schema.validate(compose("config", [found, *arm]))


def test_the_commands_with_folders_of_ones_own_can_be_composed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the template, with the study that the page prints."""
    shutil.copytree(TEMPLATE, program.folder / "my_project")
    (program.folder / "conf").mkdir()
    page = (ROOT / "docs/howto/own_project.md").read_text()
    (study,) = re.findall(r"```yaml\n(defaults: .*?)```", page, re.DOTALL)
    (program.folder / "conf" / "study.yaml").write_text(study)
    monkeypatch.syspath_prepend(program.folder)
    commands = [words for words in HOWTO if any("--" in word or "searchpath" in word for word in words)]
    assert len(commands) == 3
    for words in commands:
        one_arm = [word.partition(",")[0] for word in words if word != "-m"]
        assert program(*one_arm, "--cfg=job").status == 0
