"""A text's documents are found, read and split as its page says."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaccum_exp.data import corpus
from gaccum_exp.data.corpus import hold_out, read_corpus
from gaccum_exp.data.text import text
from gaccum_exp.errors import BadInputError


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return the path of a folder of files, among them hidden and blank ones."""
    root = tmp_path / "texts"
    files = {"b.txt": "bees", "a/z.txt": "zebras", "a.md": "ants", ".hidden": "no", "c/.git/x": "no"}
    for name, content in (files | {"c/blank.txt": " \n", "c/d": "donkeys"}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return str(root)


def test_files_of_a_folder_are_documents_in_the_order_of_their_paths(folder: str) -> None:
    """Folders below it are read too; hidden and blank files are not."""
    assert read_corpus(folder, "\n").documents == ("ants", "zebras", "bees", "donkeys")


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    fraction=st.floats(0.01, 0.99),
)
def test_about_the_fraction_is_held_out(sizes: list[int], fraction: float) -> None:
    """Both parts have a document, together they are all, and the share is off by half a document."""
    documents = [chr(97 + index) * size for index, size in enumerate(sizes)]
    train, test = hold_out(documents, fraction)
    if len(documents) == 1:
        assert train[0] + test[0] == documents[0]
        assert abs(len(test[0]) - fraction * sizes[0]) <= 1
        return
    assert train
    assert test
    assert sorted(train + test) == sorted(documents)
    assert [d for d in documents if d in test] == test
    missed = abs(sum(map(len, test)) - fraction * sum(sizes))
    assert missed <= max(sizes) / 2 + 1e-9 or 1 in (len(train), len(test))


def test_held_out_documents_are_of_all_lengths() -> None:
    """Of a hundred documents of lengths 1 to 100 every tenth is held out, or nearly so."""
    _, test = hold_out(["x" * size for size in range(1, 101)], 0.1)
    lengths = sorted(map(len, test))
    assert 8 <= len(lengths) <= 12
    assert max(lengths[i + 1] - lengths[i] for i in range(len(lengths) - 1)) <= 20


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Files of editors that begin with one read like all others, and so do Windows' line ends."""
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfab\r\n\r\ncd")
    assert read_corpus(str(tmp_path / "marked"), "\n\n").documents == ("ab", "cd")


def test_corpus_is_read_once_for_both_splits_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second split finds the file in memory; an edit of the file is seen."""
    file = str(tmp_path / "letters")
    Path(file).write_text("abc\n\ndef\n\nghi")
    reads = []
    decode = corpus._decoded
    monkeypatch.setattr(corpus, "_decoded", lambda path: reads.append(path) or decode(path))
    corpus._read.cache_clear()
    text("train", file, context=2)
    text("test", file, context=2)
    assert len(reads) == 1
    Path(file).write_text("abc\n\ndef\n\nghi!")
    assert "!" in text("test", file, context=2).classes
    assert len(reads) == 2


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """Of many files the message says which one, and where in it."""
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(BadInputError, match=r"latin\.txt is not UTF-8 \(byte 0xef at 2\)"):
        text("train", str(tmp_path))
