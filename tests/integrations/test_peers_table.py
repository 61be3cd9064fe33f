"""The peers' table comes out as reading their sources says, and its ground truth can disagree."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra `peers` is not installed")
pytest.importorskip("lightning", reason="the extra `peers` is not installed")
pytest.importorskip("transformers", reason="the extra `peers` is not installed")

from experiments.peers.build import CASES, ROUNDING, distance, flat, large_batch, measured, model_of
from experiments.peers.loops import PEERS

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

FAULTY = {
    "short last micro-batch": {*PEERS} - {"gaccum_exp", *(p for p in PEERS if "takes" in p)},
    "partial last window": {"the seed's loop", "accelerate", "Lightning"},
    "variable-length tokens": {*PEERS} - {"gaccum_exp", *(p for p in PEERS if "takes" in p)},
}
"""Who divides each mean by N; who divides by N although the window holds fewer."""


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    """accelerate keeps its settings, Lightning's logger its level, for the life of the process."""
    from accelerate.state import AcceleratorState, GradientState

    level = logging.getLogger("lightning.pytorch").level
    yield
    logging.getLogger("lightning.pytorch").setLevel(level)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_a_peer_is_biased_where_its_source_says_and_nowhere_else(case: str, peer: str) -> None:
    """By the ground truth, with which `watch` agrees at every step, or `measured` raises."""
    cell = measured(PEERS[peer], CASES[case])
    off = cell.error is None or cell.error > 0.01
    assert off == (peer in FAULTY.get(case, ()))
    assert off or cell.error < ROUNDING


def test_the_table_is_not_written_where_watch_and_ground_truth_part_ways() -> None:
    """A peer whose audit reports another e, another verdict or fewer windows is an error."""
    rows = CASES["equal micro-batches"]

    def claiming(**claims: Any) -> Any:
        def peer(model: Any, optimizer: Any, loader: Any) -> Any:
            audit = PEERS["the seed's loop"](model, optimizer, loader)
            (window,) = audit.windows
            said = SimpleNamespace(e=window.e, verdict=window.verdict, report=window.report)
            return SimpleNamespace(windows=[SimpleNamespace(**vars(said) | claims)], left_over=0)

        return peer

    assert measured(claiming(), rows).error < ROUNDING
    for claims in ({"e": 0.1}, {"verdict": "biased"}, {"verdict": "inconclusive"}):
        with pytest.raises(AssertionError, match="ground truth"):
            measured(claiming(**claims), rows)


def test_the_ground_truth_is_the_mean_over_what_counts() -> None:
    """Against torch's own cross entropy over the second window's samples."""
    rows = CASES["partial last window"]
    model = model_of(rows)
    weights = flat(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(rows.inputs[256:]), rows.labels[256:])
    loss.backward()
    assert distance(large_batch(rows, 1, weights), flat(p.grad for p in model.parameters())) < 1e-14
