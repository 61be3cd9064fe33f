"""Every block of every page is right as written: `make test-docs`, some minutes.

A reader follows each page from top to bottom in a folder of their own: files that it shows are written,
commands run to the exit status that the page gives, blocks of Python run in one session, and the words
of the output that it shows are those that are printed. What is left out is skipped with the reason that
its mark gives.
"""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.reader import GIVEN, Reader, given_for, unseen
from tests.docs.shown import PAGES, Block, blocks
from tests.program import environment
from tests.support import ROOT

SHOWN = [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Return one who is at the top of this page."""
    reader = Reader(request.param, tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


@pytest.mark.pages
@pytest.mark.parametrize(
    ("reader", "block"),
    [
        pytest.param(b.page, b, marks=pytest.mark.xdist_group(b.page), id=f"{b.page}:{b.line}")
        for b in SHOWN
    ],
    indirect=["reader"],
    scope="module",
)
def test_a_block_of_a_page_is_right_as_written(reader: Reader, block: Block) -> None:
    """A file, a command, a piece of Python, or what the one before it prints."""
    if block.mark == "not run":
        pytest.skip(str(block.said))
    reader.follow(block)


@pytest.mark.pages
@pytest.mark.parametrize("notebook", sorted(ROOT.glob("docs/**/*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_prints_what_stands_in_it(notebook: Path, tmp_path: Path) -> None:
    """Executed by a kernel in an empty folder, from its first cell to its last."""
    shown = nbformat.read(notebook, as_version=4)
    executed = nbformat.read(notebook, as_version=4)
    kernel = NotebookClient(
        executed, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    kernel.execute(env=environment())
    for before, after in zip(shown.cells, executed.cells, strict=True):
        assert unseen(text_of(before), text_of(after)) == []


def text_of(cell: nbformat.NotebookNode) -> str:
    """Return what a cell's outputs say as text."""
    outputs = cell.get("outputs", [])
    return "\n".join(output.get("text") or output["data"]["text/plain"] for output in outputs)


def test_every_block_is_followed_or_says_why_not() -> None:
    """What is no command, Python or output has a mark, each mark its reason, what is given its page."""
    for block in SHOWN:
        where = f"{block.page}:{block.line}"
        assert block.mark or block.language in {"sh", "python", "text"}, where
        assert block.mark != "not run" or len(str(block.said)) >= len("a drawing"), where
    given = {given_for(block.page) for block in SHOWN}
    assert set(GIVEN.glob("*.py")) - {GIVEN / "my_pkg.py"} <= given


def test_output_that_is_not_as_shown_is_found() -> None:
    """Another word, a line that is missing or too early; numbers and the machine's load may differ."""
    shown = (
        "biased by N = 4\nepoch 0: loss 0.5 …\nother processes had the processor, which\nit include\n2"
        "; a step\nthere takes 2.8 × as long."
    )
    assert unseen(shown, "biased by N = 8\n\nepoch 1: loss 7e-3 MiB of it") == []
    assert unseen(shown, "equivalent by N = 4\nepoch 0: loss 0.5") == ["biased by N = 4"]
    assert unseen(shown, "epoch 0: loss 0.5\nbiased by N = 4") == ["epoch 0: loss 0.5"]
