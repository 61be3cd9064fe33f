"""The commands of docs/worth.md are configurations that the program takes."""

import re
import shlex

import pytest

from tests.support import ROOT, settings

COMMANDS = re.findall(
    r"^python -m gaccum_exp -m ((?:.*\\\n)*.*)$", (ROOT / "docs/worth.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_sweep_can_be_composed(command: str) -> None:
    """Its first arm and its last."""
    overrides = [word.partition("=") for word in shlex.split(command.replace("\\\n", " "))]
    for which in (0, -1):
        assert settings(*(f"{key}={value.split(',')[which]}" for key, _, value in overrides))


def test_the_page_has_its_commands() -> None:
    """Of the comparison, of equal epochs and of equal steps."""
    assert len(COMMANDS) == 3
