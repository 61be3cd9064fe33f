"""The page on Python runs as a notebook, which trains classes of its own and shows what comes of it."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.program import environment
from tests.support import ROOT

PAGE = ROOT / "docs/howto/from_python.md"


@pytest.mark.slow
def test_the_page_on_python_runs_as_a_notebook(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real processes; progress comes in lines, and a result is the top of the page, shown once."""
    monkeypatch.chdir(home)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # where it is set, kernels show nothing of other processes
    cells = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    cells.insert(3, "result")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    _, swept, printed, shown, compared = (cell.outputs for cell in notebook.cells)
    assert "N=3 · 2 of 2: 20/20  loss" in text_of(swept)
    assert len(text_of(swept).splitlines()) < 12
    assert {output.output_type for output in (*swept, *printed)} == {"stream"}
    assert "N\u00a0=\u00a03 is equivalent to the large batch</strong>" in shown[0].data["text/html"]
    assert shown[0].data["text/plain"] == text_of(printed).rstrip()
    assert compared[-1].data["image/png"]


def text_of(outputs: list[Any]) -> str:
    """Return what a cell has printed."""
    return "".join(output.text for output in outputs if output.output_type == "stream")
