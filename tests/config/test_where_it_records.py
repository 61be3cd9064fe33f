"""Which store and experiment a command means, and that a password in its address goes nowhere."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from gaccum_exp import cli
from gaccum_exp.config import explain
from gaccum_exp.config.arguments import quoted
from gaccum_exp.errors import BadInputError, hide_passwords
from gaccum_exp.tracking.mlflow_store import Store
from gaccum_exp.tracking.store_uri import experiment_name, refuse_password, tracking_uri
from tests.program import TINY, Program, in_a_process
from tests.support import settings as composed_settings

SECRET = "hunter2"
WITH_PASSWORD = [
    f"http://alice:{SECRET}@127.0.0.1:5000",
    f"https://alice:{SECRET}@mlflow.example/path",
    f"http://alice:{SECRET}@with@signs@127.0.0.1",
    f"postgresql://alice:{SECRET}@127.0.0.1/db",
    f"postgresql+psycopg2://alice:a/{SECRET}@127.0.0.1/db",
    f"postgresql://127.0.0.1/db?user=alice&password={SECRET}",
    f"postgresql://alice@127.0.0.1/db?sslpassword={SECRET}",
    f"mysql+pymysql://alice:{SECRET}@127.0.0.1/db",
    f"mssql+pyodbc:///?odbc_connect=UID%3Dalice%3BPWD%3D{SECRET}",
    f"https://mlflow.example/?token={SECRET}",
    "http://alice:5000@127.0.0.1",
    f"https://{SECRET}@mlflow.example/path",
    f"https://{SECRET}:@mlflow.example",
    f"http://alice@corp:{SECRET}@127.0.0.1:5000",
    f"postgresql://alice@corp:{SECRET}@127.0.0.1/db",
    f"postgresql+psycopg2://alice@srv:{SECRET}@srv.example:5432/db",
    f"postgresql://alice:12/{SECRET}@127.0.0.1/db",
    f"postgresql://alice:1234#{SECRET}@127.0.0.1/db",
    f"postgresql://:{SECRET}@127.0.0.1/db",
    f"mysql+pymysql://alice:p?{SECRET}@127.0.0.1/db",
    f"mysql+pymysql://alice@127.0.0.1/db?charset=utf8&pass={SECRET}",
    f"mysql+pymysql://alice@127.0.0.1/db?passwd={SECRET}",
]
WITHOUT = [
    "sqlite:///mlflow.db",
    "sqlite:////home/a:b@c/mlflow.db",
    "http://127.0.0.1:5000",
    "http://127.0.0.1:5000/mail@example",
    "https://mlflow.example/a@b?c=d@e",
    "postgresql://alice@corp@127.0.0.1/db",
    "postgresql://127.0.0.1:5432/db",
    "sqlite:///C:/home/a@b/mlflow.db",
    "postgresql://alice@127.0.0.1:5432/db?passfile=~/.pgpass",
    "mysql+pymysql://alice@127.0.0.1/db?read_default_file=~/.my.cnf",
]


@pytest.mark.parametrize("uri", WITH_PASSWORD)
def test_a_password_is_refused_and_its_place_is_named(uri: str) -> None:
    """Wherever it stands in the address; the message does not repeat it."""
    for source, call in (
        ("tracking.uri", tracking_uri),
        ("--uri", lambda u: refuse_password(u, "--uri")),
    ):
        with pytest.raises(BadInputError, match=f"^{source}: an address with a password") as raised:
            call(uri)
        assert SECRET not in str(raised.value)
    places = {"http": "MLFLOW_TRACKING_PASSWORD", "postgresql": "PGPASSWORD", "mysql": ".my.cnf"}
    kind = uri.partition("://")[0].partition("+")[0].replace("https", "http")
    assert places.get(kind, "in another way") in str(raised.value)


@pytest.mark.parametrize("uri", WITHOUT)
def test_an_address_without_a_password_is_taken_as_it_is(uri: str) -> None:
    """A port, the user of a database, and signs in a path are none."""
    assert tracking_uri(uri) == uri == hide_passwords(uri)


def test_a_number_that_is_an_address_is_a_text() -> None:
    """As a sweep over sort(2,1) gives them, whose journals nobody could deliver."""
    to = composed_settings("tracking.uri=1", "tracking.experiment_name=2").tracking
    assert (to.uri, to.experiment_name) == ("1", "2")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///?a=b"])
def test_a_database_in_memory_is_refused(uri: str) -> None:
    """What is recorded there ends with the process that records it."""
    with pytest.raises(BadInputError, match=r"^MLFLOW_TRACKING_URI=sqlite:/.*a database in memory"):
        tracking_uri(uri, "MLFLOW_TRACKING_URI")
    assert tracking_uri("sqlite:///file.db") == "sqlite:///file.db"


def test_messages_lose_the_passwords_of_addresses() -> None:
    """Also one about a value that cannot be read at all."""
    said = explain.one_line(BadInputError(f"x={WITH_PASSWORD[0]}: not one of y"), [])
    assert said == "x=http://…@127.0.0.1:5000: not one of y"
    assert SECRET not in hide_passwords(" and ".join(WITH_PASSWORD))


def test_the_environment_speaks_where_the_configuration_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLflow's own variables; without them a file beside, and the program's name."""
    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(key, raising=False)
    assert (tracking_uri(), experiment_name()) == ("sqlite:///mlflow.db", "gaccum_exp")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert (tracking_uri(), experiment_name()) == ("http://127.0.0.1:5000", "mine")
    assert (tracking_uri("sqlite:///x.db"), experiment_name("x")) == ("sqlite:///x.db", "x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", WITH_PASSWORD[0])
    with pytest.raises(BadInputError, match="an address with a password"):
        tracking_uri()


@settings(max_examples=40)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t\f\v$\x85\u2028\u2029"), min_size=1)
)
def test_any_name_survives_as_an_override(name: str) -> None:
    """Quotes and backslashes too: the arms of a sweep are told the experiment that way."""
    override = OverridesParser.create().parse_override(f"tracking.experiment_name={quoted(name)}")
    assert override.value() == name


@pytest.mark.parametrize("arguments", [[], ["-m", "accum.steps=1,2"]])
def test_what_the_environment_says_is_used_recorded_and_named(
    arguments: list[str],
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By a run, a sweep and a report; one line names the store, whatever the number of arms."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", program.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "it's mine")
    assert cli.main([*TINY, "audit.at_start=false", *arguments]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "recorded in" in line]
    assert said == [f"recorded in {program.uri}, experiment it's mine"]
    runs = Store(program.uri, "it's mine").sweep(program.sweep_id)
    assert len(runs) == 1 + bool(arguments)
    recorded = {(run.params["tracking.uri"], run.params["tracking.experiment_name"]) for run in runs}
    assert recorded == {(program.uri, "it's mine")}
    assert cli.main(["report", program.sweep_id]) == 0


FILES = {
    "experiment/x": f"# @package _global_\ntracking:\n  uri: {WITH_PASSWORD[0]}\n",
    "experiment/fine": "# @package _global_\nseed: 1\n",
    "experiment/chooses": "# @package _global_\ndefaults:\n  - override /tracking: t\n",
    "experiment/sweeps": "# @package _global_\nhydra:\n  sweeper:\n    params:\n"
    f"      tracking.uri: sqlite:///x.db,{WITH_PASSWORD[0]}\n",
    "tracking/t": f"uri: {WITH_PASSWORD[3]}\nexperiment_name: x\nlog_weights: true\n",
}


@pytest.mark.parametrize(
    "arguments",
    [
        [f"tracking.uri={WITH_PASSWORD[0]}"],
        ["-m", "seed=1,2", f"tracking.uri={WITH_PASSWORD[3]}"],
        ["-m", "seed=1,2", f'tracking.uri="{WITH_PASSWORD[5]}"'],
        [f"tracking={{uri:'{WITH_PASSWORD[0]}',experiment_name:x}}"],
        ["-m", f"tracking.uri=sqlite:///x.db,'{WITH_PASSWORD[7]}'"],
        ["-m", f'tracking.uri=choice(sqlite:///x.db,"{WITH_PASSWORD[0]}")'],
        ["seed=1", "tracking.uri=${oc.env:OWN}"],
        [f"tracking.uri={WITH_PASSWORD[0]}?a=(b"],
        [f"tracking.url={WITH_PASSWORD[0]}"],
        ["experiment=x"],
        ["-m", "seed=1,2", "experiment=x"],
        ["-m", "experiment=fine,x"],
        ["-m", "experiment=fine,chooses"],
        ["-m", "tracking=mlflow,t"],
        ["-m", "experiment=sweeps"],
    ],
)
def test_a_password_is_refused_before_anything_is_written(
    arguments: list[str], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is quoted, in a file or in the line, of one run or an arm."""
    mine = program.folder / "mine"
    for name, text in FILES.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("OWN", WITH_PASSWORD[0])
    ended = program.as_given("--config-dir", str(mine), *TINY, *arguments)
    assert ended.status == 2, ended.plain
    assert SECRET not in ended.plain
    assert not [path for path in files_with_secret(program.folder) if mine not in path.parents]
    assert not (program.folder / "outputs").exists()
    assert not (program.folder / "multirun").exists()


def files_with_secret(folder: Path) -> list[Path]:
    """Return the files that hold it."""
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    "words",
    [
        *([], ["-m"], ["report", "x"]),
        *([word, "x", "--uri", WITH_PASSWORD[0]] for word in ("report", "deliver")),
    ],
)
def test_no_command_takes_a_password(
    words: list[str], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as an argument of its own nor from the environment."""
    if "--uri" not in words:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", WITH_PASSWORD[0])
    ended = program.as_given(*words)
    assert (ended.status, "an address with a password" in ended.err) == (2, True)
    assert SECRET not in ended.plain
    assert not files_with_secret(program.folder)


@pytest.mark.slow
def test_a_sweeps_id_and_store_reach_its_arms_and_do_not_show(program: Program) -> None:
    """Not in names, recorded overrides or Hydra's own names of jobs."""
    where = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    ended = in_a_process(
        program.folder, "-m", *TINY, "accum.steps=1,2", "audit.at_start=false", where,
        "hydra.job.config.override_dirname.exclude_keys=[train.steps]",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    runs = program.arms()
    assert [run.tags["sweep_id"] for run in runs] == [program.sweep_folder.name] * 2
    assert [run.params["tracking.uri"] for run in runs] == ["sqlite:///mlflow.db"] * 2
    assert [run.name for run in runs] == [
        "N=1 · micro 256 · global_mean",
        "N=2 · micro 128 · global_mean",
    ]
    assert [run.overrides for run in runs] == [
        [*TINY, f"accum.steps={n}", "audit.at_start=False"] for n in (1, 2)
    ]
    folders = {path.name for path in program.sweep_folder.iterdir() if path.name.startswith("accum")}
    assert folders == {
        f"accum.steps={n},audit.at_start=False,model.hidden=[8],model=mlp,runtime.device=cpu"
        for n in (1, 2)
    }
