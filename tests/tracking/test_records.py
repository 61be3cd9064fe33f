"""What a stored run knows of itself is read from what it recorded, or derived from that."""

from gaccum_exp.tracking.records import Curve, RunRecord


def run(params: dict[str, str], tags: dict[str, str] | None = None) -> RunRecord:
    """Return a run with these parameters and tags."""
    return RunRecord("id", "1", "name", "FINISHED", 0, params, tags or {}, {})


def test_n_is_that_with_which_a_run_ended() -> None:
    """As configured, unless its windows were split finer; unknown before a config was recorded."""
    configured = {"accum.steps": "4"}
    assert run(configured).accum_steps == 4
    assert run(configured, {"accum.steps_used": "16"}).accum_steps == 16
    assert run({}).accum_steps is None
    assert run({"accum.steps": "None"}).accum_steps is None


def test_a_batch_that_was_left_null_is_n_micro_batches() -> None:
    """And the sizes of micro-batches are those tagged, else as equal as they can be, largest first."""
    derived = run({"accum.steps": "3", "data.micro_batch_size": "4", "data.global_batch_size": "None"})
    assert (derived.global_batch_size, derived.micro_batch_sizes) == (12, (4, 4, 4))
    uneven = {"accum.steps": "3", "data.global_batch_size": "11"}
    assert run(uneven).micro_batch_sizes == (4, 4, 3)
    assert run(uneven, {"micro_batch_sizes": "3, 5, 3"}).micro_batch_sizes == (5, 3, 3)
    assert run({}).micro_batch_sizes == ()


def test_a_control_is_known_by_its_tag_or_by_its_seed() -> None:
    """A run that has neither is an arm."""
    assert run({}, {"role": "control"}).is_control
    assert run({"audit.control_seed": "0"}).is_control
    assert not run({"audit.control_seed": "None"}, {"role": "candidate"}).is_control


def test_a_schedule_decides_what_is_trained_only_where_it_moves_the_batch() -> None:
    """How a batch is split, and bookkeeping, never do."""
    params = {"seed": "1", "accum.steps": "2", "accum.schedule": "{0: 1}", "tracking.uri": "x"}
    assert run(params).training_config == {"seed": "1"}
    moved = run(params, {"global_batches": "4 to 8"}).training_config
    assert moved == {"seed": "1", "accum.schedule": "{0: 1}"}


def test_the_last_value_of_a_metric_is_the_recorded_one_or_its_curves() -> None:
    """None where it was never recorded."""
    curves = {"a": Curve((1, 2), (3.0, 4.0)), "b": Curve((), ())}
    record = RunRecord("id", "1", "name", "FINISHED", 0, {}, {}, {"a": 5.0}, curves)
    assert (record.last("a"), record.last("b"), record.last("c")) == (5.0, None, None)
    assert RunRecord("id", "1", "name", "FINISHED", 0, {}, {}, {}, curves).last("a") == 4.0
