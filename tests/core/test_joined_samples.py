"""Joining micro-batches: where the samples are follows from what agrees; what does not is refused."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from gaccum_exp.core.joined_samples import NotJoinableError, SampleLayout
from gaccum_exp.core.sample_reading import joined, picked, sample_layouts

SIZES = (2, 3, 1)
T, F = 7, 5


def only(parts: list[Any], **how: Any) -> SampleLayout:
    (layout,) = sample_layouts(parts, **how)
    return layout


def boxes(count: int) -> Tensor:
    return torch.rand(count, 4)


def image(height: int, width: int = 6) -> Tensor:
    return torch.rand(3, height, width)


def records(sizes: tuple[int, ...]) -> list[list[dict[str, Any]]]:
    """Micro-batches as lists of dictionaries, of images of several sizes with 1 box or more."""
    return [
        [
            {"image": image(5 + n + i), "boxes": boxes(1 + (n * i) % 3), "name": f"{n}{i}"}
            for i in range(n)
        ]
        for n in sizes
    ]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], v) for k, v in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("sizes", [SIZES, (2, 2, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize(
    "form", ["list of records", "lists side by side", "dictionary of lists", "nested"]
)
def test_lists_with_an_entry_per_sample_are_joined_entry_by_entry(
    sizes: tuple[int, ...], form: str
) -> None:
    """In every structure that a collate function gives, and samples are picked out of it again."""

    def of(record: list[dict[str, Any]]) -> Any:
        images, targets = [r["image"] for r in record], [{"boxes": r["boxes"]} for r in record]
        forms = {
            "list of records": record,
            "lists side by side": (tuple(images), tuple(targets)),
            "dictionary of lists": {"images": images, "boxes": [t["boxes"] for t in targets]},
            "nested": ({"images": images}, {"targets": {"boxes": [t["boxes"] for t in targets]}}),
        }
        return forms[form]

    micro_batches = records(sizes)
    every = [r for record in micro_batches for r in record]
    parts = [of(record) for record in micro_batches]
    layout = only(parts)
    assert layout.sizes == list(sizes)
    whole = layout.joined(parts)
    assert same(whole, of(every))
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    assert same(layout.picked(whole, order), of([every[i] for i in order.tolist()]))


def test_equal_images_with_equal_box_counts_are_a_list_of_records_all_the_same() -> None:
    """Three channels, three boxes each: no batch of three."""
    parts = [[{"image": image(8, 8), "boxes": boxes(3)} for _ in range(2)] for _ in range(4)]
    assert sample_layouts(parts)[0].sizes == [2] * 4


@pytest.mark.parametrize("sizes", [SIZES, (2, 2, 2)])
def test_a_pair_of_inputs_and_targets_is_no_list_of_two_samples(sizes: tuple[int, ...]) -> None:
    """Tensors with a dimension of samples are joined along it."""
    parts = [(torch.rand(n, F), torch.rand(n, 3)) for n in sizes]
    whole = sample_layouts(parts)[0].joined(parts)
    assert [t.shape for t in whole] == [(sum(sizes), F), (sum(sizes), 3)]


@pytest.mark.parametrize("sizes", [SIZES, (2, 2, 2)])
def test_sequences_with_time_first_are_joined_along_the_batch_that_their_targets_have(
    sizes: tuple[int, ...],
) -> None:
    """(T, B, F) with the arguments of CTC: (T, B, C), (B, S), (B,) and (B,)."""
    inputs = [{0: torch.rand(T, n, F)} for n in sizes]
    ctc = [[(T, n, 4), (n, 6), (n,), (n,)] for n in sizes]
    layout = only(inputs, others=ctc)
    assert layout.sizes == list(sizes)
    assert layout.joined(inputs)[0].shape == (T, sum(sizes), F)
    losses = [(torch.rand(T, n, 4), torch.rand(n, 6), torch.full((n,), T), torch.rand(n)) for n in sizes]
    assert [t.shape[d] for t, d in zip(only(losses).joined(losses), (1, 0, 0, 0), strict=True)] == [
        sum(sizes)
    ] * 4


def test_where_all_shapes_agree_with_two_readings_both_are_returned_the_first_dimension_first() -> None:
    """Time and batch in inputs and targets alike; a given dimension, or given sizes, settle it."""
    parts = [(torch.rand(T, 2, F), torch.rand(T, 2)) for _ in range(3)]
    assert [layout.sizes[0] for layout in sample_layouts(parts)] == [T, 2]
    assert only(parts, dim=1).sizes == [2, 2, 2]
    assert sample_layouts(parts, sizes=[2, 2, 2])[0].sizes == [2, 2, 2]


@pytest.mark.parametrize("sizes", [SIZES, (2, 2)])
def test_names_beside_tensors_are_picked_with_their_samples(sizes: tuple[int, ...]) -> None:
    """A list of strings, of as many entries."""
    parts = [
        {"x": torch.rand(n, F), "names": [f"{i}.{k}" for k in range(n)]} for i, n in enumerate(sizes)
    ]
    layout = sample_layouts(parts)[0]
    assert layout.differing == ()
    whole = layout.joined(parts)
    assert whole["names"] == [name for part in parts for name in part["names"]]
    last = picked(whole, torch.tensor([sum(sizes) - 1]), sum(sizes))
    assert (last["names"], len(last["x"])) == (parts[-1]["names"][-1:], 1)


def test_numbers_that_go_up_are_named_and_the_joined_batch_has_the_first() -> None:
    """Under any name; a number of samples is added up."""
    parts = [{"x": torch.rand(n, F), "n": n, "i": i, "t": torch.tensor(i)} for i, n in enumerate(SIZES)]
    layout = sample_layouts(parts)[0]
    assert layout.differing == ("i", "t")
    whole = layout.joined(parts)
    assert (whole["n"], whole["i"], int(whole["t"])) == (sum(SIZES), 0, 0)
    assert [p["i"] for p in layout.with_first_values(parts)] == [0, 0, 0]
    assert [p["n"] for p in layout.with_first_values(parts)] == list(SIZES)


@dataclass
class Graph:
    x: Tensor
    edge_index: Tensor
    y: Tensor


@pytest.mark.parametrize("nodes", [(4, 5), (4, 4)])
@pytest.mark.parametrize("as_many_edges", [True, False])
def test_graphs_are_refused_as_edges_would_point_to_the_first_graphs_nodes(
    nodes: tuple[int, ...], as_many_edges: bool
) -> None:
    """Also where a graph has as many edges as nodes, so that shapes agree."""
    parts = [
        Graph(
            torch.rand(n, F),
            (torch.arange(2 * (n if as_many_edges else 3)) % n).view(2, -1).flip(i),
            torch.rand(n),
        )
        for i, n in enumerate(nodes)
    ]
    with pytest.raises(NotJoinableError, match="edge_index"):
        sample_layouts(parts)


def test_packed_sequences_are_joined_sequence_by_sequence() -> None:
    """Their rows are neither samples nor time; in whatever order each was packed."""
    sequences = [torch.rand(n, F) for n in (3, T, 5, 2)]
    parts = [pack_sequence(sequences[:2], enforce_sorted=False), pack_sequence(sequences[2:])]
    layout = only(parts)
    assert layout.sizes == [2, 2]
    whole = layout.joined(parts)
    assert all(map(torch.equal, unpack_sequence(whole), sequences))
    order = torch.tensor([2, 0, 3])
    chosen = unpack_sequence(layout.picked(whole, order))
    assert all(map(torch.equal, chosen, [sequences[i] for i in order.tolist()]))


def test_a_tensor_without_samples_is_as_long_as_the_longest() -> None:
    """A causal mask of each micro-batch's own length is the head of the longest one."""
    masks = [torch.ones(n, n).tril() for n in (3, T, 5)]
    parts = [(torch.rand(2, len(m), F), m) for m in masks]
    layout = sample_layouts(parts, guess=True)[0]
    assert layout.sizes == [2] * 3
    assert layout.joined(parts)[1].equal(masks[1])
    assert layout.padded_alone(parts[0])[1].equal(masks[1])
    others = sample_layouts([(x, m + i) for i, (x, m) in enumerate(parts)], guess=True)
    assert all(layout.sizes == [3, T, 5] for layout in others)


@pytest.mark.parametrize(
    ("rows", "fill"),
    [
        ([[1, 2, 3, 7, 7], [1, 7, 7, 7, 7]], 7),
        ([[1, 2, 3, 4, 5], [6, 1, 4, 2, 3]], 0),
        ([[False] * 3, [False] * 3], 1),
        ([[True] * 3, [True] * 3], 0),
        ([[True] * 3, [True, True, False]], 0),
        ([[0.5, 2.0, 0.0], [1.0, 3.0, 4.0]], 0),
    ],
)
def test_sequences_are_padded_as_those_of_the_loop_are(rows: list[list[Any]], fill: float) -> None:
    """With what ends the shorter ones; a mask that excludes nothing with what excludes; else with 0."""
    one = torch.tensor(rows)
    parts = [one, one[:, :1].repeat(1, len(rows[0]) + 2)]
    joint = sample_layouts(parts, guess=True, dim=0)[0].joined(parts)
    assert joint[:2, len(rows[0]) :].eq(fill).all()


def test_no_message_holds_values_and_each_says_what_to_give() -> None:
    """Tensors that differ without a dimension of samples, and padding that is not known."""
    differing = [(torch.rand(4, F), torch.full((2, 3), 0.5 + i)) for i in range(2)]
    with pytest.raises(NotJoinableError, match=r"\(2, 3\), \(2, 3\).*give one tensor to all") as error:
        sample_layouts([{"x": x, "prior": prior} for x, prior in differing])
    assert "0.5" not in str(error.value)
    assert "prior" in str(error.value)
    unequal = [(torch.rand(4, 5 + i), torch.rand(4, 2)) for i in range(2)]
    with pytest.raises(NotJoinableError, match="pad"):
        sample_layouts(unequal)


def test_what_belongs_to_no_sample_is_joined_where_the_sizes_are_given() -> None:
    """As the constant of a loss."""
    shared = torch.rand(3)
    assert joined([{"w": shared}, {"w": shared}], [2, 2])["w"] is shared
