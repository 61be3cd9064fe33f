"""A folder of configurations of one's own, and what is said where a block is written wrongly."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from gaccum_exp.config import explain
from gaccum_exp.config.schema import conf_dir
from gaccum_exp.errors import BadInputError
from tests.program import Program
from tests.support import settings

TERMS = """
terms:
  seg: {criterion: {_target_: torch.nn.CrossEntropyLoss, ignore_index: 255}, output: out, target: mask}
  depth: {criterion: {_target_: torch.nn.L1Loss}, output: aux, target: depth, weight: 0.4}
"""


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_file_of_ones_own_is_found_wherever_its_folder_is_named(program: Program, place: int) -> None:
    """Flags and overrides may stand in any order; the block is the one that the README prints."""
    folder = program.folder / "mine" / "criterion"
    folder.mkdir(parents=True)
    (folder / "two.yaml").write_text(TERMS)
    arguments = ["model=mlp", "criterion=two", "--cfg=job"]
    ended = program(*arguments[:place], "--config-dir", "mine", *arguments[place:])
    assert ended.status == 0
    assert "weight: 0.4" in ended.out
    assert "hidden" in ended.out


def test_a_file_that_is_not_there_is_held_against_ones_own_too(program: Program) -> None:
    """The nearest name may be in the folder that was given."""
    (program.folder / "mine" / "criterion").mkdir(parents=True)
    (program.folder / "mine" / "criterion" / "two.yaml").write_text(TERMS)
    (line,) = program("--config-dir", "mine", "criterion=tow").lines
    assert line.endswith("did you mean 'two'?")


def test_a_block_that_is_given_as_a_mapping_is_told_how_to_be_given() -> None:
    """Not that there is no such key."""
    override = "criterion={terms:{a:1}}"
    with initialize_config_dir(conf_dir(), version_base="1.3"), pytest.raises(HydraException) as raised:
        compose("config", [override])
    said = str(explain.one_line(raised.value, [override]))
    assert said.startswith("criterion: takes the name of a file")
    assert "--config-dir" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["criterion=custom", "+criterion.terms={a:1}"],
            "criterion._target_ must be set; criterion.terms belongs to criterion=terms",
        ),
        (
            ["criterion=custom", "+criterion.criterion={terms:{a:1}}"],
            "without a line `criterion:` around",
        ),
        (["optimizer=custom"], "optimizer._target_ must be set$"),
        (["criterion._target_=null"], "criterion._target_ must be set$"),
    ],
)
def test_a_block_that_builds_nothing_is_refused_with_the_likely_reason(
    overrides: list[str], said: str
) -> None:
    """By its key, in one line."""
    with pytest.raises(BadInputError, match=said):
        settings(*overrides)


def test_terms_need_no_class() -> None:
    """They are what `criterion=terms` is given."""
    found = settings("criterion=terms", "+criterion.terms.a={criterion:{_target_:torch.nn.MSELoss}}")
    assert list(found.criterion["terms"]) == ["a"]
