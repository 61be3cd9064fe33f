"""What a run leaves in MLflow, and that nothing is lost on the way there or back."""

import math
import multiprocessing
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from experiments.mlflow_browser import mlflow_server
from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking import mlflow_store
from gaccum_exp.tracking.mlflow_store import BATCH, Store
from gaccum_exp.tracking.records import DatasetRecord, RunRecord
from gaccum_exp.tracking.sink import MlflowSink, Point, kept_weights
from tests.program import Program

EVERY_STEP = ("train/loss", "optim/lr", "optim/grad_norm")


def begun(store: Store, **params: Any) -> MlflowSink:
    """Begin a run with nothing but these parameters."""
    return MlflowSink(store.start_run("run", params=params, tags={"sweep_id": "a"}, texts={}))


def points(count: int, first: int = 1) -> list[Point]:
    """Return `count` steps' losses, told apart by their values."""
    return [Point(step, step, {"train/loss": step / 7}) for step in range(first, first + count)]


class Unsteady:
    """A client whose `log_batch` fails at some calls, before or after the values have arrived."""

    def __init__(self, client: MlflowClient, failing: set[int], after: bool) -> None:
        self._client, self._failing, self._after = client, failing, after
        self.sizes: list[int] = []
        self.taken = 0

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), **rest: Any) -> None:
        self.sizes.append(len(metrics))
        fails = len(self.sizes) in self._failing
        if not fails or self._after:
            self._client.log_batch(run_id, metrics=metrics, **rest)
            self.taken += len(metrics)
        if fails:
            raise MlflowException("the server is away")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def test_a_sweep_leaves_a_complete_top_level_run_for_every_arm(program: Program) -> None:
    """Tags, parameters, resolved YAML, weights; no run is nested, since the UI hides nested curves."""
    program.tiny("-m", "accum.steps=1,3", "data.global_batch_size=100", "runtime.threads=1")
    arms = program.arms()
    assert [run.name for run in arms] == [
        "N=1 · micro 100 · global_mean", "N=3 · micro 34 · global_mean"
    ]  # fmt: skip
    for run, role, sizes in zip(
        arms, ("reference", "candidate"), ("100", "34, 33, 33"), strict=True
    ):  # fmt: skip
        assert "mlflow.parentRunId" not in run.tags
        expected = {
            "sweep_id": program.sweep_id, "kind": "arm", "role": role, "micro_batch_sizes": sizes,
            "device": "cpu", "threads": "1", "memory.source": "tracker", "choice.model": "mlp",
            "version.torch": torch.__version__.partition("+")[0],
        }  # fmt: skip
        assert {key: run.tags[key].partition("+")[0] for key in expected} == expected
        assert run.tags["memory.peak_phase"] in ("forward/backward", "optimizer step")
        assert run.tags["git_commit"] == "none"  # the working directory is no checkout
        assert {"version.mlflow", "version.hydra-core", "python", "overrides"} <= run.tags.keys()


def test_every_resolved_value_is_a_parameter_and_stands_in_the_yaml(program: Program) -> None:
    """Dotted names, interpolations resolved, derived sizes as they were used."""
    program.tiny("accum.steps=3", "data.global_batch_size=100", "data=fake", "data.image_size=4")
    (run,) = program.arms()
    client = MlflowClient(program.uri)
    path = client.download_artifacts(run.run_id, "config.yaml", str(program.folder))
    resolved = yaml.safe_load(Path(path).read_text())
    expected = dict(flattened(resolved)) | {"data.micro_batch_size": 34}
    assert run.params == {key: str(value) for key, value in expected.items()}
    assert run.params["data.train.image_size"] == "4"
    assert run.params["accum.steps"] == "3"
    assert "${" not in Path(path).read_text()


def flattened(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        pairs += flattened(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return pairs


def test_datasets_are_inputs_whose_digest_changes_with_the_data(program: Program) -> None:
    """One for training and one for evaluation; the same data under another seed is the same input."""

    def inputs(*arguments: str) -> dict[str, tuple[str, str]]:
        program.tiny("data=fake", "data.image_size=4", "data.global_batch_size=16", *arguments)
        (run,) = program.arms()
        found = MlflowClient(program.uri).get_run(run.run_id).inputs.dataset_inputs
        return {i.tags[0].value: (i.dataset.name, i.dataset.digest) for i in found}

    first = inputs("data.size=32")
    assert {context: name for context, (name, _) in first.items()} == {
        "training": "gaccum_exp.data.fake.fake",
        "evaluation": "gaccum_exp.data.fake.fake",
    }
    assert inputs("data.size=32", "seed=5") == first
    other = inputs("data.size=33")
    assert other["training"][1] != first["training"][1]
    assert first["training"][1] != first["evaluation"][1]


def test_metrics_come_every_step_at_evaluations_and_once_per_run(program: Program) -> None:
    """Against the optimizer step, whose first is 1."""
    program.tiny("train.eval_every_steps=3", "train.steps=7", "accum.steps=2", "scheduler=cosine")
    (run,) = program.arms()
    for key in EVERY_STEP:
        assert run.curves[key].global_steps == (1, 2, 3, 4, 5, 6, 7)
    assert run.curves["optim/lr"].values[0] > run.curves["optim/lr"].values[-1] > 0
    for key in ("eval/loss", "eval/accuracy"):
        assert run.curves[key].global_steps == (3, 6, 7)
    once = {"memory/predicted_peak_bytes", "memory/resident_set_bytes", "memory/peak_bytes"}
    once |= {"memory/tracked_peak_bytes", "time/step_s", "throughput/samples_per_s"}
    parts = ("parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs")
    once |= {f"memory/{part}_bytes" for part in parts}
    assert once <= run.metrics.keys()
    assert sum(run.metrics[f"memory/{part}_bytes"] for part in parts) == run.metrics["memory/peak_bytes"]
    client = MlflowClient(program.uri)
    assert all(len(client.get_metric_history(run.run_id, key)) == 1 for key in once)


def test_final_weights_are_kept_unless_they_are_not_wanted(program: Program) -> None:
    """By parameter name, and readable without trusting the file."""
    program.tiny()
    kept = kept_weights(program.store(), program.arms()[0].run_id)
    assert kept is not None
    assert {tuple(tensor.shape) for tensor in kept.values()} == {(8, 64), (8,), (10, 8), (10,)}
    program.tiny("tracking.log_weights=false")
    assert kept_weights(program.store(), program.arms()[0].run_id) is None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("failing", [{1}, {2}, {1, 2, 3}])
def test_a_failed_delivery_is_repeated_with_no_value_lost_or_doubled(
    program: Program, failing: set[int], after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the server had taken the values before it failed or not."""
    store = program.store()
    sink = begun(store)
    client = Unsteady(sink.run._client, failing, after)
    sink.run._client = client  # type: ignore[assignment]
    for first in (1, 2501, 2601):
        sink.send(points(2500 if first == 1 else 100, first))
    sink.close("FINISHED")
    assert "not delivered yet" in caplog.text
    assert max(client.sizes) <= BATCH == 1000
    # Repeated only where the server had taken what it then failed to acknowledge.
    assert client.taken == 2700 or (after and client.taken > 2700)
    history = MlflowClient(store.uri).get_metric_history(sink.run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(k, k / 7) for k in range(1, 2701)]


def test_what_the_store_refuses_for_a_moment_is_tried_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two arms create the entry of the same data at once; and not for ever."""
    store = program.store()
    sink, attempts = begun(store), 0
    accept = sink.run._client.log_inputs

    def refuse(times: int) -> None:
        def log_inputs(*args: Any) -> None:
            nonlocal attempts
            attempts += 1
            if attempts <= times:
                raise MlflowException("UNIQUE constraint failed")
            accept(*args)

        monkeypatch.setattr(sink.run._client, "log_inputs", log_inputs)

    refuse(2)
    sink.log_datasets([DatasetRecord("digits", "abcd", 3, "training")])
    assert attempts == 3
    assert len(MlflowClient(store.uri).get_run(sink.run.run_id).inputs.dataset_inputs) == 1
    refuse(100)
    with pytest.raises(MlflowException, match="UNIQUE"):
        sink.log_datasets([])


def _tag_often(uri: str, gate: Any) -> None:
    """Set new tags of one experiment at the same moments as another process does."""
    store = Store(uri, "gaccum_exp")
    for number in range(12):
        gate.wait(60)
        store.set_experiment_tag(f"view {number}", "arranged")


@pytest.mark.slow
def test_two_sweeps_may_arrange_the_view_at_once(program: Program) -> None:
    """MLflow inserts a tag that it has not found, and of two such inserts one fails."""
    Store(program.uri, "gaccum_exp")
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    pair = [context.Process(target=_tag_often, args=(program.uri, gate)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0]


def test_what_can_never_be_delivered_is_no_finished_run(program: Program) -> None:
    """The last delivery's failure is the run's, and not passed over."""
    sink = begun(program.store())
    sink.run._client = Unsteady(sink.run._client, set(range(100)), False)  # type: ignore[assignment]
    sink.send(points(3))
    with pytest.raises(MlflowException, match="away"):
        sink.close("FINISHED")


def test_a_long_history_reads_back_whole_and_in_order(program: Program) -> None:
    """More values than one answer of the store holds, recorded in no order."""
    store = program.store()
    sink = begun(store)
    sink.send(points(1300, first=1001))
    sink.send(points(1000))
    sink.close("FINISHED")
    (run,) = store.sweep("a")
    assert run.curves["train/loss"].global_steps == tuple(range(1, 2301))
    assert run.curves["train/loss"].values == tuple(k / 7 for k in range(1, 2301))


def test_more_runs_than_a_page_read_back(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of more arms than one answer of the store lists."""
    store = program.store()
    for _ in range(5):
        begun(store).close("FINISHED")
    search = MlflowClient.search_runs
    asked: list[str | None] = []

    def two_at_a_time(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["page_token"])
        assert len(asked) <= 3, "the same page again and again"
        return search(self, *args, **(kwargs | {"max_results": 2}))

    monkeypatch.setattr(MlflowClient, "search_runs", two_at_a_time)
    assert len(store.sweep("a")) == 5


def test_long_and_many_parameters_are_recorded(program: Program) -> None:
    """Cut to what MLflow stores, not refused by it."""
    store = program.store()
    begun(store, long="x" * 20_000, **{f"key{i}": i for i in range(250)}).close("FINISHED")
    (run,) = store.sweep("a")
    assert len(run.params["long"]) == 6000
    assert run.params["key249"] == "249"


def test_a_run_that_cannot_be_begun_is_not_left_running(program: Program) -> None:
    """A parameter that the store refuses ends the run as FAILED, with the reason."""
    store = program.store()
    with pytest.raises(MlflowException, match="Names may only contain"):
        begun(store, **{"model.a@b": 1})
    (run,) = store.sweep("a")
    assert run.status == "FAILED"
    assert "Names may only contain" in run.tags["failure"]


def test_a_deleted_experiment_is_named_with_what_to_do(program: Program) -> None:
    """MLflow keeps the name of a deleted experiment, and refuses to make another of it."""
    store = program.store()
    MlflowClient(store.uri).delete_experiment(store.experiment_id)
    with pytest.raises(
        BadInputError, match=r"tracking\.experiment_name=gaccum_exp: deleted in MLflow; re"
    ):
        Store(store.uri, "gaccum_exp")


def _open_often(uri: str, gate: Any, found: Any) -> None:
    """Open stores of several names at the same moments as another process does."""
    for name in ("a", "b", "c", "d"):
        gate.wait(60)
        found.put((name, Store(uri, name).experiment_id))


@pytest.mark.slow
def test_two_processes_may_create_the_same_experiment_at_once(program: Program) -> None:
    """Both get the same one, as arms that start side by side must."""
    context = multiprocessing.get_context("spawn")
    gate, found = context.Barrier(2), context.Queue()
    pair = [context.Process(target=_open_often, args=(program.uri, gate, found)) for _ in range(2)]
    for process in pair:
        process.start()
    answers = [found.get(timeout=60) for _ in range(8)]
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert len(set(answers)) == 4


def test_a_server_that_does_not_answer_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one attempt to connect, before MLflow would retry for minutes."""
    monkeypatch.setattr("gaccum_exp.tracking.mlflow_store.MlflowClient", None)  # must not come to that
    with pytest.raises(BadInputError, match=r"tracking\.uri=http://127\.0\.0\.1:9: no tracking server"):
        Store("http://127.0.0.1:9", "gaccum_exp")


@pytest.mark.slow
def test_a_sweep_recorded_through_a_server_reads_back_as_from_a_file(program: Program) -> None:
    """The same curves, parameters and weights over http, and the same comparison at the end."""

    def recorded(uri: str) -> list[RunRecord]:
        ended = program.tiny("-m", "accum.steps=1,2", f"tracking.uri={uri}")
        assert ended.status == 0, ended.err
        store = Store(uri, "gaccum_exp")
        runs = sorted(store.sweep(program.sweep_id), key=lambda run: run.name)
        assert all(kept_weights(store, run.run_id) for run in runs)
        return runs

    served = program.folder / "served"
    served.mkdir()
    in_file = recorded(program.uri)
    with mlflow_server(f"sqlite:///{served / 'mlflow.db'}", program.folder / "log") as address:
        over_http = recorded(address)
    for one, other in zip(in_file, over_http, strict=True):
        assert one.curves == other.curves
        assert (one.name, one.status) == (other.name, other.status)
        differing = {k for k in one.params if one.params[k] != other.params[k]}
        assert differing == {"tracking.uri", "sweep_id"}


def test_curves_read_from_the_file_are_those_that_mlflow_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and infinities, a step recorded twice, and a file name that has to be quoted."""
    folder = tmp_path / "no #1"
    folder.mkdir()
    store = Store(f"sqlite:///{folder / 'ml flow.db'}", "gaccum_exp")
    sink = begun(store)
    values = [0.5, math.nan, math.inf, -math.inf, 3e-320, 1e300, 2.0]
    for step, value in zip([1, 2, 3, 4, 5, 6, 6], values, strict=True):
        sink.send([Point(step, step, {"train/loss": value})])
    sink.close("FINISHED")
    monkeypatch.setattr(store._client, "get_metric_history", lambda *_: pytest.fail("by the client"))
    (run,) = store.sweep("a")
    history = MlflowClient(store.uri).get_metric_history(run.run_id, "train/loss")
    given = sorted((metric.step, metric.value) for metric in history)
    curve = run.curves["train/loss"]
    assert repr(list(zip(curve.global_steps, curve.values, strict=True))) == repr(given)
    assert curve.global_steps == (1, 2, 3, 4, 5, 6, 6)
    assert math.isnan(curve.values[1])


def test_where_the_file_cannot_be_read_mlflow_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables that are no longer as they were are no end of a report."""
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "gaccum_exp")
    sink = begun(store)
    sink.send(points(3))
    sink.close("FINISHED")
    monkeypatch.setattr(store._client, "get_metric_history", lambda *_: pytest.fail("by the client"))
    assert store.sweep("a")[0].curves["train/loss"].global_steps == (1, 2, 3)
    monkeypatch.undo()
    monkeypatch.setattr(mlflow_store, "_database", lambda _: closing(sqlite3.connect(":memory:")))
    (run,) = store.sweep("a")
    assert run.curves["train/loss"].values == tuple(step / 7 for step in (1, 2, 3))


def test_references_are_found_by_their_parameters(tmp_path: Path) -> None:
    """Not by reading every run of the store; one that has not finished is none."""
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "gaccum_exp")
    for rate, status in (("0.1", "FINISHED"), ("0.2", "FINISHED"), ("0.1", "FAILED")):
        params = {"optimizer.lr": rate, "model._target_": "a.b"}
        MlflowSink(store.start_run(rate, params=params, tags={"role": "reference"}, texts={})).close(
            status
        )
    assert len(store.references()) == 2
    like = {"optimizer.lr": "0.1", "model._target_": "a.b"}
    assert [run.params["optimizer.lr"] for run in store.references(like)] == ["0.1"]
    assert store.references({"optimizer.lr": "0.3"}) == []
