"""What a run leaves in MLflow, and that nothing is lost on the way back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml
from mlflow import MlflowClient

from gaccum_exp.errors import BadInputError
from gaccum_exp.tracking.mlflow_store import Store
from gaccum_exp.tracking.sink import kept_weights
from tests.program import Program

EVERY_STEP = ("train/loss", "optim/lr", "optim/grad_norm")


def begun(store: Store, *, name: str = "run", tags: Mapping[str, str] | None = None) -> str:
    """Begin a run and return its id."""
    return store.create_run(
        uuid4().hex, name, tags={"sweep_id": "a"} | dict(tags or {}), start_time_ms=1, again=False
    )


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
    once |= {"memory/tracked_peak_bytes", "time/step_s", "time/step_windows", "throughput/samples_per_s"}
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


def test_a_long_history_reads_back_whole_and_in_order(program: Program) -> None:
    """More values than one request holds, recorded in no order."""
    store = program.store()
    run_id = begun(store)
    for first, last in ((1001, 2300), (1, 1000)):
        store.log_points(run_id, [("train/loss", k / 7, k, k) for k in range(first, last + 1)])
    (run,) = store.sweep("a")
    assert run.curves["train/loss"].global_steps == tuple(range(1, 2301))
    assert run.curves["train/loss"].values == tuple(k / 7 for k in range(1, 2301))


def test_more_runs_than_a_page_read_back(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of more arms than one answer of the store lists."""
    store = program.store()
    for _ in range(5):
        begun(store)
    search = MlflowClient.search_runs
    asked: list[str | None] = []

    def two_at_a_time(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["page_token"])
        assert len(asked) <= 3, "the same page again and again"
        return search(self, *args, **(kwargs | {"max_results": 2}))

    monkeypatch.setattr(MlflowClient, "search_runs", two_at_a_time)
    assert len(store.sweep("a")) == 5


def test_a_deleted_experiment_is_named_with_what_to_do(program: Program) -> None:
    """MLflow keeps the name of a deleted experiment, and refuses to make another of it."""
    store = program.store()
    MlflowClient(store.uri).delete_experiment(store.experiment_id)
    with pytest.raises(
        BadInputError, match=r"tracking\.experiment_name=gaccum_exp: deleted in MLflow; re"
    ):
        Store(store.uri, "gaccum_exp")


def test_references_are_found_by_their_parameters(home: Path) -> None:
    """Not by reading every run of the store; one that has not finished is none."""
    store = Store(f"sqlite:///{home / 'mlflow.db'}", "gaccum_exp")
    for rate, status in (("0.1", "FINISHED"), ("0.2", "FINISHED"), ("0.1", "FAILED")):
        run_id = begun(store, name=rate, tags={"role": "reference"})
        store.log_params(run_id, {"optimizer.lr": rate, "model._target_": "a.b"})
        store.end_run(run_id, status, None, 2)
    assert len(store.references()) == 2
    like = {"optimizer.lr": "0.1", "model._target_": "a.b"}
    assert [run.params["optimizer.lr"] for run in store.references(like)] == ["0.1"]
    assert store.references({"optimizer.lr": "0.3"}) == []
