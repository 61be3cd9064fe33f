"""Text becomes samples without losing or inventing a token, and no split sees the other's."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaccum_exp.data.corpus import hold_out, read_corpus
from gaccum_exp.data.sequences import IGNORED, TokenSequences
from gaccum_exp.data.text import text
from gaccum_exp.errors import BadInputError

POEM = (
    "Über allen Gipfeln\nist Ruh,\n\nin allen Wipfeln\nspürest du\n\nkaum einen Hauch 🌲;\n\nwarte nur."
)


def decoded(dataset: TokenSequences, tokens: Tensor) -> str:
    """Return the text of tokens, by the names that the data set gives them."""
    names = [dataset.classes[token] for token in tokens]
    if len(dataset.classes) == 256 and names[0].startswith("0x"):
        return bytes(int(name, 16) for name in names).decode()
    return "".join(names)


def glued(dataset: TokenSequences) -> Tensor:
    """Return the inputs of all samples, end to end."""
    return torch.cat([sample["input_ids"] for sample in samples(dataset)])


def samples(dataset: TokenSequences) -> list[dict[str, Tensor]]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the path of a text of four documents, not all of its characters ASCII."""
    (tmp_path / "poem.txt").write_text(POEM, encoding="utf-8")
    return str(tmp_path / "poem.txt")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return the path of a folder of four files."""
    for name in ("ants", "bees", "donkeys", "zebras"):
        (tmp_path / name).write_text(name)
    return str(tmp_path)


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
@pytest.mark.parametrize("shift_labels", [True, False])
@pytest.mark.parametrize("context", [2, 3, 7])
def test_packed_blocks_are_the_text(file: str, tokens: str, shift_labels: bool, context: int) -> None:
    """Glued together they are the split's documents and separators, but for less than a block."""
    for split, documents in zip(("train", "test"), hold_out(POEM.split("\n\n"), 0.3), strict=True):
        dataset = text(
            split, file, tokens, context=context, shift_labels=shift_labels, eval_fraction=0.3
        )
        whole = "\n\n".join(documents)
        expected = list(whole) if tokens == "characters" else list(whole.encode())
        inputs = glued(dataset)
        names = [dataset.classes[token] for token in inputs]
        known = names if tokens == "characters" else [int(name, 16) for name in names]
        assert known == expected[: len(known)]
        assert 0 <= len(expected) - int(shift_labels) - len(known) < context
        assert dataset.lengths.tolist() == [context] * len(dataset)


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
@pytest.mark.parametrize("shift_labels", [True, False])
@pytest.mark.parametrize("context", [2, 5, 100])
def test_pieces_are_the_documents(file: str, tokens: str, shift_labels: bool, context: int) -> None:
    """Nothing of a document is lost, and no piece holds tokens of two documents."""
    for split, documents in zip(("train", "test"), hold_out(POEM.split("\n\n"), 0.3), strict=True):
        dataset = text(split, file, tokens, "documents", context, "longest", shift_labels, 0.3)
        pieces = iter(samples(dataset))
        for document in documents:
            size = len(document) if tokens == "characters" else len(document.encode())
            parts: list[Tensor] = []
            while sum(map(len, parts)) < size - int(shift_labels):
                sample = next(pieces)
                assert 1 <= len(sample["input_ids"]) <= context
                parts.append(sample["input_ids"])
            if shift_labels:
                parts.append(sample["labels"][-1:])
            assert all(len(part) == context for part in parts[: -1 - int(shift_labels)])
            assert decoded(dataset, torch.cat(parts)) == document
        assert next(pieces, None) is None


@pytest.mark.parametrize("layout", ["packed", "documents", "paragraphs"])
def test_labels_are_the_next_tokens(layout: str) -> None:
    """Each label is the next input, across the ends of samples too, so that no prediction is lost."""
    dataset = text("test", layout=layout, context=50)
    found = samples(dataset)
    assert all(torch.equal(one["labels"][:-1], one["input_ids"][1:]) for one in found)
    following = [
        torch.equal(one["labels"][-1:], other["input_ids"][:1])
        for one, other in pairwise(found)
        if len(one["input_ids"]) == 50
    ]
    # Only a document whose length is one more than a multiple of the context ends with a whole piece.
    assert sum(following) > 0.9 * len(following)
    assert layout != "packed" or all(following)


def test_without_a_shift_labels_are_the_inputs(file: str) -> None:
    """As Hugging Face's models expect them, which shift them inside."""
    for sample in samples(text("train", file, layout="documents", context=4, shift_labels=False)):
        assert torch.equal(sample["input_ids"], sample["labels"])


def test_paragraphs_are_the_parts_of_the_documents_held_out(tmp_path: Path) -> None:
    """A file's paragraphs are samples by themselves, and stay in the split of their file."""
    (tmp_path / "one").write_text("ab\n\ncde\n\n \n\nf")
    (tmp_path / "two").write_text("gh\n\nijk")
    train, test = (
        text(split, str(tmp_path), layout="paragraphs", shift_labels=False, eval_fraction=0.4)
        for split in ("train", "test")
    )
    assert [decoded(train, sample["input_ids"]) for sample in samples(train)] == ["ab", "cde", "f"]
    assert [decoded(test, sample["input_ids"]) for sample in samples(test)] == ["gh", "ijk"]
    predicted = text("train", str(tmp_path), layout="paragraphs", eval_fraction=0.4)
    assert predicted.lengths.tolist() == [1, 2]  # of one token nothing can be predicted


def test_reference_needs_no_file_and_is_unequal_by_paragraphs() -> None:
    """The default is real text in thousands of samples, a tenth held out."""
    train, test = text("train"), text("test")
    assert len(train) > 2000
    assert float(test.lengths.sum() / train.lengths.sum()) == pytest.approx(1 / 9, rel=0.1)
    assert train.classes == test.classes
    assert "assert" in decoded(train, train[0]["input_ids"])  # the first name in the alphabet
    lengths = text("train", layout="paragraphs").lengths.double()
    assert float(lengths.std() / lengths.mean()) > 0.3


@pytest.mark.parametrize("layout", ["packed", "documents", "paragraphs"])
def test_splits_share_no_document(folder: str, layout: str) -> None:
    """Every file is in one split, and whole."""
    # Labels are all of a document but its first character.
    found = []
    for split in ("train", "test"):
        dataset = text(split, folder, layout=layout, context=1, eval_fraction=0.3, separator="|")
        found.append(decoded(dataset, torch.cat([sample["labels"] for sample in samples(dataset)])))
    assert found == [{"packed": "nts|bees|donkeys"}.get(layout, "ntseesonkeys"), "ebras"]


def test_split_depends_on_no_seed() -> None:
    """Two seeds hold out the same text, and the run's generator stays where it is."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = text("test").gather(torch.arange(50))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one["input_ids"], text("test").gather(torch.arange(50))["input_ids"])


def test_a_single_document_is_cut_and_its_end_held_out(file: str) -> None:
    """With no separator in it, the first part is trained on and the rest held out."""
    train, test = (
        text(split, file, context=1, eval_fraction=0.25, separator="") for split in ("train", "test")
    )
    last = [decoded(dataset, dataset[len(dataset) - 1]["labels"]) for dataset in (train, test)]
    cut = round(len(POEM) * 0.75)
    assert decoded(train, glued(train)) + last[0] == POEM[:cut]
    assert decoded(test, glued(test)) + last[1] == POEM[cut:]


def test_vocabulary_is_of_both_splits_and_beyond_ascii(file: str) -> None:
    """Characters are sorted, of all documents, each a token; bytes are 256, whatever occurs."""
    for split in ("train", "test"):
        assert text(split, file, context=3).classes == sorted(set(POEM))
        of_bytes = text(split, file, "bytes", context=3).classes
        assert (len(of_bytes), of_bytes[0], of_bytes[0x41]) == (256, "0x00", "0x41")


def test_a_separator_that_joins_files_is_in_the_vocabulary(folder: str) -> None:
    """What stands between packed documents is a token even where no file holds it."""
    assert "§" in text("train", folder, context=2, separator="§").classes


@given(data=st.data())
def test_gather_is_collate_of_the_samples(data: st.DataObject) -> None:
    """Both ways to make a micro-batch agree, for any indices, layout, shift and padding."""
    dataset = text(
        "test",
        layout=data.draw(st.sampled_from(["packed", "documents", "paragraphs"])),
        tokens=data.draw(st.sampled_from(["characters", "bytes"])),
        context=data.draw(st.integers(2, 300)),
        shift_labels=data.draw(st.booleans()),
        padding=data.draw(st.sampled_from(["longest", "max_length"])),
    )
    chosen = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=9))
    gathered = dataset.gather(torch.tensor(chosen))
    collated = dataset.collate_fn([dataset[index] for index in chosen])
    assert list(gathered) == list(collated) == ["input_ids", "labels"]
    for key, micro_batch in gathered.items():
        assert micro_batch.dtype == collated[key].dtype == torch.int64
        assert torch.equal(micro_batch, collated[key])


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_padding_stands_after_the_sequence_and_is_ignored(padding: str) -> None:
    """Labels are -100 exactly after a sample's length; up to there they are the sample's own."""
    dataset = text("test", layout="paragraphs", context=200, padding=padding)
    # The shorter half, so that the longest of the micro-batch is not that of the data set.
    indices = dataset.lengths.argsort()[: len(dataset) // 2 : 9]
    micro_batch = dataset.gather(indices)
    lengths = dataset.lengths[indices]
    assert lengths.max() < dataset.lengths.max()
    longest = lengths.max() if padding == "longest" else dataset.lengths.max()
    assert micro_batch["input_ids"].shape == micro_batch["labels"].shape == (len(indices), longest)
    assert len(set(lengths.tolist())) > 3
    for row, (index, length) in enumerate(zip(indices.tolist(), lengths.tolist(), strict=True)):
        sample = dataset[index]
        assert len(sample["input_ids"]) == len(sample["labels"]) == length
        for key, value in (("input_ids", 0), ("labels", IGNORED)):
            assert torch.equal(micro_batch[key][row, :length], sample[key])
            assert (micro_batch[key][row, length:] == value).all()
        assert (sample["labels"] >= 0).all()


def test_lengths_count_the_tokens_to_predict() -> None:
    """Their sum is what is left of every document without its first token."""
    dataset = text("train", layout="documents", context=100)
    documents, _ = hold_out(read_corpus(None, "\n\n").documents, 0.1)
    assert int(dataset.lengths.sum()) == sum(len(document) - 1 for document in documents)
    counted = sum(int((sample["labels"] != IGNORED).sum()) for sample in samples(dataset))
    assert int(dataset.lengths.sum()) == counted


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shift_labels", [True, False])
def test_samples_are_int64_and_share_no_memory(dtype: torch.dtype, shift_labels: bool) -> None:
    """What is written into one tensor of a sample or a micro-batch leaves all others as they were."""
    tokens = torch.arange(1, 8, dtype=dtype)
    starts, lengths = torch.tensor([0, 3]), torch.tensor([3, 3])
    dataset = TokenSequences(tokens, starts, lengths, list("abcdefgh"), shift_labels)
    for taken in (dataset[1], dataset.gather(torch.tensor([1]))):
        labels = taken["labels"].clone()
        assert taken["input_ids"].dtype == labels.dtype == torch.int64
        taken["input_ids"].zero_()
        assert torch.equal(taken["labels"], labels)
        taken["labels"].zero_()
        assert torch.equal(tokens, torch.arange(1, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split": "val"}, "data.split=val is none of train, test"),
        ({"tokens": "character"}, "did you mean 'characters'"),
        ({"layout": "document"}, "did you mean 'documents'"),
        ({"padding": "max"}, "data.padding=max is none of longest, max_length"),
        ({"context": 0}, "data.context=0 must be at least 1"),
        ({"context": 1, "shift_labels": False}, "data.context=1 must be at least 2"),
        ({"eval_fraction": 1.0}, "data.eval_fraction=1.0"),
        ({"eval_fraction": -0.1}, "data.eval_fraction=-0.1"),
        ({"eval_fraction": 0, "split": "test"}, "data.eval._target_=null"),
        ({"context": 10**6}, "data.context=1000000: split train (data.eval_fraction=0.1) holds"),
        ({"root": "no/such/file"}, "data.root=no/such/file: there is no file or folder"),
    ],
)
def test_impossible_values_are_bad_input(changed: dict[str, Any], words: str) -> None:
    """The message has the key and the value, and what would do."""
    with pytest.raises(BadInputError) as caught:
        text(**({"split": "train"} | changed))
    assert words in str(caught.value)


def test_what_holds_no_text_is_bad_input(tmp_path: Path) -> None:
    """A blank file, a folder without files, and documents of which nothing can be predicted."""
    (tmp_path / "blank").write_text(" \n\n \n")
    with pytest.raises(BadInputError, match="blank: holds no text"):
        text("train", str(tmp_path / "blank"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("no")
    (tmp_path / "empty" / "blank").write_text(" ")
    with pytest.raises(BadInputError, match=r"empty: holds no text \(1 files"):
        text("train", str(tmp_path / "empty"))
    (tmp_path / "short").write_text("a\n\nb\n\nc")
    with pytest.raises(BadInputError, match=r"data\.layout=documents: .* no document of two tokens"):
        text("train", str(tmp_path / "short"), layout="documents")
    (tmp_path / "letter").write_text("a")
    with pytest.raises(BadInputError, match=r"split test .* holds 0 tokens"):
        text("test", str(tmp_path / "letter"))


def test_all_of_the_text_can_be_trained_on() -> None:
    """data.eval_fraction=0 holds out nothing."""
    documents = read_corpus(None, "\n\n").documents
    whole = text("train", layout="documents", eval_fraction=0)
    assert int(whole.lengths.sum()) == sum(len(document) - 1 for document in documents)
