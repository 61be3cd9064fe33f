"""What a job knows of itself, and how its end is written down."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gaccum_exp.arms.context import ArmContext, Command, Turn, label_of, name_of
from gaccum_exp.arms.outcome import (
    OUTCOME_FILE,
    Outcome,
    exit_status,
    outcomes_in_store,
    read_outcomes,
)
from gaccum_exp.arms.seeds import contexts_of_seeds
from gaccum_exp.config import schema as config
from gaccum_exp.train.stopping import NEVER
from tests.program import Program


def context(folder: Path, *overrides: str) -> ArmContext:
    config.register("20260101-000000-abcdef")
    try:
        with initialize_config_dir(config.conf_dir(), version_base="1.3"):
            composed = compose("config", list(overrides))
    finally:
        config.register()
    return ArmContext(composed, folder, overrides, {"model": "cnn"}, ("seed",), True, False)


def test_a_context_travels_to_another_process(tmp_path: Path) -> None:
    """Pickled and back, it gives the same settings, with the id of its sweep."""
    one = context(tmp_path, "accum.steps=4")
    other = pickle.loads(pickle.dumps(one))
    assert other == one
    assert config.validate(other.config) == config.validate(one.config)
    assert other.sweep_id == config.validate(other.config).sweep_id == "20260101-000000-abcdef"


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ("accum.steps", "N=4 · micro 64 · global_mean"),
        ("optimizer.lr", "lr=0.1 · N=4 · micro 64 · global_mean"),
        ("seed accum.reduction accum.steps", "N=4 · global_mean · seed=0 · micro 64"),
        ("data.global_batch_size model.norm", "batch=256 · norm=group · N=4 · micro 64 · global_mean"),
        ("model optimizer.momentum", "model=cnn · momentum=0.9 · N=4 · micro 64 · global_mean"),
        ("model._target_ seed", "model=CNN · seed=0 · N=4 · micro 64 · global_mean"),
    ],
)  # fmt: skip
def test_a_name_says_first_what_the_sweep_varies(tmp_path: Path, swept: str, name: str) -> None:
    """As short as tells its keys apart: lists cut what comes later, which all arms share."""
    job = replace(context(tmp_path, "accum.steps=4"), swept_keys=tuple(swept.split()))
    assert name_of(job, config.validate(job.config)) == name


def test_a_job_of_several_seeds_becomes_a_context_for_each(tmp_path: Path) -> None:
    """With its own seed, folder and overrides; the job's own context stays as it is."""
    job = context(tmp_path, "seed=0", "sweep.vectorize=seed", "sweep.seeds=[0,2]")
    first, second = contexts_of_seeds(job)
    assert (first.config.seed, second.config.seed) == (0, 2)
    assert second.overrides == ("seed=2", "sweep.vectorize=seed")
    assert second.folder == tmp_path / "seed=2"
    assert second.folder.is_dir()
    assert job.config.sweep.seeds == [0, 2]
    assert contexts_of_seeds(second) == [second]


def test_an_outcome_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood there stays until the new one is complete; of another sweep it is not read."""
    before = Outcome("a", "N=1", "FINISHED", verdict="biased", audit_asked=True)
    folder = tmp_path / "0"
    folder.mkdir()
    before.write(folder)
    assert read_outcomes(tmp_path, "a") == {folder: before}
    assert read_outcomes(tmp_path, "b") == {}

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("gaccum_exp.arms.outcome.os.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        Outcome("a", "N=1", "FAILED").write(folder)
    assert json.loads((folder / OUTCOME_FILE).read_text())["status"] == "FINISHED"


def test_the_exit_status_is_the_first_of_1_3_5_4_that_an_arm_earned() -> None:
    """Of verdicts only those that were asked for; bad input is 2 for a single run alone."""

    def arm(verdict: str | None = None, status: str = "FINISHED", **more: bool) -> Outcome:
        return Outcome("a", "N=1", status, verdict=verdict, **more)

    asked = {v: arm(v, audit_asked=True) for v in ("identical", "stochastic", "inconclusive", "biased")}
    assert exit_status([asked["identical"], arm("biased")], multirun=True) == 0
    assert exit_status([asked["identical"], asked["stochastic"]], multirun=True) == 4
    assert exit_status([asked["stochastic"], asked["inconclusive"]], multirun=True) == 5
    assert exit_status(list(asked.values()), multirun=True) == 3
    assert exit_status([*asked.values(), arm(status="KILLED")], multirun=True) == 1
    refused = arm(status="FAILED", bad_input=True)
    assert (exit_status([refused], multirun=False), exit_status([refused], multirun=True)) == (2, 1)


def test_outcomes_are_the_same_read_from_folders_and_from_the_store(program: Program) -> None:
    """Arms on hosts that share no folder have no other place to leave them."""
    ended = program.tiny("-m", "accum.steps=1,2,0", "audit.every_steps=2")
    assert ended.status == 1
    of_folders = read_outcomes(program.sweep_folder, program.sweep_id).values()
    of_store = outcomes_in_store(program.uri, "gaccum_exp", program.sweep_id).values()
    assert {(o.name, o.status, o.reason, o.verdict) for o in of_store} == {
        (o.name, o.status, o.reason, o.verdict) for o in of_folders
    }
    assert exit_status(list(of_store), multirun=True) == 1


def test_what_is_left_of_a_sweep_is_estimated_from_the_arms_before() -> None:
    """Each of those to follow takes what arms took in the mean; arms that had ended take nothing."""
    command = Command(NEVER, taken_s=[10.0, 20.0])
    turn = command.turn(3, 6, over=0)
    assert (str(turn), turn.left) == ("3 of 6", 3)
    assert turn.following_s(30.0) == 3 * 20.0
    assert command.turn(5, 6, over=2).left == 1
    assert command.turn(6, 6, over=0).following_s(30.0) == 0
    assert command.turn(2, None, over=0).left is None
    assert str(Turn(2, None)) == "arm 2"


def test_a_label_says_what_is_swept_in_a_few_words(tmp_path: Path) -> None:
    """N, the other swept keys, what else it is, and its turn."""
    one = context(tmp_path, "accum.steps=4", "seed=3")
    swept = replace(one, swept_keys=("accum.steps", "seed", "optimizer.lr"), turn=Turn(3, 12))
    settings = config.validate(one.config)
    assert label_of(swept, settings) == f"N=4 seed=3 lr={settings.flat()['optimizer.lr']} · 3 of 12"
    assert label_of(replace(one, swept_keys=()), settings, "control 2") == "N=4 · control 2"
    assert label_of(replace(one, swept_keys=()), settings, "a\nb") == "N=4 · a\\nb"
