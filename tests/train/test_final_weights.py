"""The weights that are stored with a run load into the user's own model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaccum_exp.report.compare.distances import weight_distance
from gaccum_exp.tracking import sink
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.sink import JournalSink, kept_weights
from gaccum_exp.train.build import build
from gaccum_exp.train.final_weights import criterion_weights_of, weights_of
from gaccum_exp.train.hooks import Hooks
from gaccum_exp.train.loop import train
from gaccum_exp.train.state import TrainState
from tests.strangers import Frozen, Net
from tests.support import STRANGER, settings

HERE = "tests.train.test_final_weights"
POINTS = (*STRANGER, "train.steps=3", "data.global_batch_size=8")


class Tied(Net):
    """Two names for one parameter, a buffer that is stored and one that is not."""

    def __init__(self) -> None:
        super().__init__(hidden=3)
        self.other = nn.Linear(3, 3).double()
        self.other.weight = self.layers[3].weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        self.seen += 1
        return self.other(super().forward(x))


class Wrapped(nn.Module):
    """Holds the model as torch.compile does."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = Tied()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2) -> logits (batch, 3)."""
        return self._orig_mod(x)


class Scaled(nn.Module):
    """A criterion with a parameter of its own."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scale * outputs, target, reduction=self.reduction)


@pytest.fixture(autouse=True)
def undelivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no journal be delivered."""
    monkeypatch.setattr(sink, "announce", lambda path: None)


def trained(*overrides: str) -> TrainState:
    state = build(settings(*POINTS, *overrides))
    train(state, Hooks())
    return state


class Stored:
    """Weights as a journal keeps them, and as a comparison asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sink = JournalSink(Journal.create(folder, "sqlite:///none.db", "test"))

    def keep(self, state: TrainState) -> "Stored":
        self.sink.keep_weights(weights_of(state), criterion_weights_of(state))
        return self

    def fetch(self, run_id: str, name: str, folder: str) -> str | None:
        path = self.folder / name
        return str(path) if path.exists() else None


@pytest.mark.parametrize(
    ("trained_as", "own"),
    [("Tied", Tied), ("Wrapped", Tied)],
)
def test_they_load_strictly_into_the_plain_model(tmp_path: Path, trained_as: str, own: Any) -> None:
    """Buffers included, tied ones under both names, wrapped or not; read without trusting the file."""
    state = trained(f"model._target_={HERE}.{trained_as}")
    Stored(tmp_path).keep(state)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = own()
    model.load_state_dict(weights, strict=True)
    inner = state.model._orig_mod if trained_as == "Wrapped" else state.model
    for ours, theirs in zip(model.state_dict().values(), inner.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert int(model.seen) > 0
    assert weights_of(state).left_out == []
    assert criterion_weights_of(state) is None


def test_batch_norms_statistics_are_among_them(tmp_path: Path) -> None:
    """What evaluation needs, of the built-in CNN."""
    state = build(
        settings("model=cnn", "model.width=4", "model.norm=batch", "train.steps=2", "runtime.device=cpu")
    )
    train(state, Hooks())
    Stored(tmp_path).keep(state)
    fresh = build(
        settings("model=cnn", "model.width=4", "model.norm=batch", "runtime.device=cpu", "seed=1")
    ).model
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), state.model.eval()(x))


def test_of_a_model_that_is_trained_in_part_they_are_that_part(tmp_path: Path) -> None:
    """Adapters alone, and it is said."""
    state = trained("model._target_=tests.strangers.Frozen")
    Stored(tmp_path).keep(state)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(weights) == ["layers.3.weight", "layers.3.bias"]
    assert weights_of(state).left_out == ["the 2 of 4 parameters that were not trained"]
    missing = Frozen().load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []


def test_a_criterions_own_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    """And count in the distance between two arms."""
    state = trained("criterion=custom", f"criterion._target_={HERE}.Scaled")
    stored = Stored(tmp_path).keep(state)
    Net().load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    own = torch.load(tmp_path / "criterion_weights.pt", weights_only=True)
    Scaled().load_state_dict(own, strict=True)
    kept = kept_weights(stored, "run")
    assert kept is not None
    assert [*kept][-1] == "criterion.scale"
    assert float(kept["criterion.scale"]) != 1.0


def test_distances_are_those_of_parameters_and_of_older_files(tmp_path: Path) -> None:
    """The same bits as over all parameters as they were stored before, whoever stored which."""
    states = [trained(f"model._target_={HERE}.Tied", f"accum.steps={n}") for n in (1, 3)]
    new, old = [], []
    for number, state in enumerate(states):
        stored = Stored(tmp_path / str(number)).keep(state)
        new.append(kept_weights(stored, "run"))
        before = {n: p.detach() for n, p in state.modules.named_parameters() if p.requires_grad}
        torch.save(before, tmp_path / str(number) / "weights.pt")
        old.append(kept_weights(stored, "run"))
    assert [*new[0]] == [*old[0]] == [n for n, _ in states[0].model.named_parameters()]
    expected = weight_distance(old[1], old[0])
    assert expected
    for ours, theirs in ((new[1], new[0]), (new[1], old[0]), (old[1], new[0])):
        assert weight_distance(ours, theirs) == expected


class Keeping(Net):
    """Keeps a state of its own, which torch does not read without trusting the file."""

    def get_extra_state(self) -> Any:
        return {"path": Path("here")}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_cannot_be_read_safely_is_left_out_by_name() -> None:
    """The rest loads with `strict=False`."""
    weights = weights_of(trained(f"model._target_={HERE}.Keeping"))
    assert "_extra_state" not in weights.entries
    (said,) = weights.left_out
    assert said.startswith("_extra_state (")


def test_a_view_is_stored_alone(tmp_path: Path) -> None:
    """Of a tensor that is a part of a larger one, not the whole is written."""
    state = trained()
    whole = torch.zeros(100_000, dtype=torch.float64)
    parameter = state.parameters[0]
    whole[: parameter.numel()] = parameter.detach().flatten()
    parameter.data = whole[: parameter.numel()].view_as(parameter)
    Stored(tmp_path).keep(state)
    assert (tmp_path / "weights.pt").stat().st_size < 20_000
