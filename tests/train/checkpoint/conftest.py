"""What all tests of checkpoints need."""

from typing import Any

import pytest

from gaccum_exp.train.checkpoint.hook import Writer


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every checkpoint be written before the next window: the machine may be busy."""
    start = Writer.start

    def started(self: Writer, *arguments: Any) -> None:
        start(self, *arguments)
        self.wait()

    monkeypatch.setattr(Writer, "start", started)
