"""A folder of configurations of one's own, and what is said where a block is written wrongly."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.errors import HydraException

from gaccum_exp.config import explain, schema
from gaccum_exp.config.schema import conf_dir
from gaccum_exp.errors import BadInputError
from tests.program import Program
from tests.support import settings

TERMS = """
terms:
  seg: {criterion: {_target_: torch.nn.CrossEntropyLoss, ignore_index: 255}, output: out, target: mask}
  depth: {criterion: {_target_: torch.nn.L1Loss}, output: aux, target: depth, weight: 0.4}
"""


PROJECT = "a_project_of_ones_own"


@pytest.fixture
def project(program: Program, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of configurations of a package that can be imported, and stands in `conf/`."""
    folder = program.folder / PROJECT / "conf"
    (folder / "criterion").mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "criterion" / "two.yaml").write_text(TERMS)
    (folder / "study.yaml").write_text(
        "defaults: [config, _self_]\nmodel: {hidden: [3]}\nhydra: {searchpath: [pkg://gaccum_exp.conf]}"
    )
    monkeypatch.syspath_prepend(program.folder)
    return folder


def test_a_packages_files_are_found_by_hydras_search_path(program: Program, project: Path) -> None:
    """As Hydra's users name them, in a package or in a folder."""
    for entry in (
        f"pkg://{PROJECT}.conf",
        f"file://{project}",
        str(project.relative_to(program.folder)),
    ):
        ended = program(f"hydra.searchpath=[{entry}]", "criterion=two", "model=mlp", "--cfg=job")
        assert ended.status == 0
        assert "weight: 0.4" in ended.out


def test_a_projects_own_beginning_composes_ours(program: Program, project: Path) -> None:
    """From `pkg://gaccum_exp.conf`, in a checkout as in an installed package."""
    where = ("--config-path", str(project), "--config-name", "study")
    ended = program(*where, "model=mlp", "criterion=two", "--cfg=job")
    assert ended.status == 0
    assert "_target_: gaccum_exp.models.mlp.MLP" in ended.out
    assert "hidden:\n  - 3" in ended.out


def test_another_hydra_program_composes_our_blocks() -> None:
    """By the module's name, as `initialize_config_module` takes it."""
    schema.register()
    with initialize_config_module("gaccum_exp.conf", version_base="1.3"):
        assert compose("config", ["model=mlp"]).model._target_ == "gaccum_exp.models.mlp.MLP"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra.searchpath=[pkg://nobodys.conf]"], "there is no package nobodys.conf"),
        ([f"hydra.searchpath=[pkg://{PROJECT}.conf.criterion]"], "only with a file __init__.py in"),
        (["hydra.searchpath=[file://nowhere/at/all]"], "there is no folder nowhere/at/all"),
        (["hydra.searchpath=conf"], "hydra.searchpath=conf: is a list, such as [pkg://"),
        ([f"hydra.searchpath=[pkg://{PROJECT}.conf]", "criterion=tow"], "did you mean 'two'?"),
        (["--config-dir", f"{PROJECT}/conf", "criterion=three"], "rename"),
        (["--config-dir", f"{PROJECT}/conf", "model=mlp"], "model=mlp: "),
        (["--config-dir", f"{PROJECT}/conf", "-m", "model=cnn,mlp"], "give yours another name"),
        (["--config-path", f"{PROJECT}/conf", "--config-name", "stuyd"], "did you mean 'study'?"),
        (["--config-path", f"{PROJECT}/conf/criterion"], "there is no config.yaml in"),
        (["data=imagefolder"], "data.root must be set"),
        (
            ["criterion=terms", "criterion.terms={a:{weight:1}}"],
            "has + in front (+criterion.terms.x=value)",
        ),
    ],
)
def test_what_hydra_would_pass_over_or_explain_badly_is_said_in_a_sentence(
    program: Program, project: Path, arguments: list[str], said: str
) -> None:
    """A file in the way of one of ours would never be read; a folder that is not there only told of."""
    (project / "model").mkdir()
    (project / "model" / "mlp.yaml").write_text("_target_: mine.MLP")
    (project / "criterion" / "three.yml").write_text(TERMS)
    ended = program(*arguments)
    (line,) = ended.lines
    assert ended.status == 2
    assert said in line


def test_the_names_of_ones_own_beginning_and_of_the_programs_are_kept_apart(
    program: Program, project: Path
) -> None:
    """A `config.yaml` in a folder that is added would never be read."""
    (project / "study.yaml").rename(project / "config.yaml")
    (line,) = program("--config-dir", str(project), "task=plan").lines
    assert "give yours another name and --config-name" in line


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
