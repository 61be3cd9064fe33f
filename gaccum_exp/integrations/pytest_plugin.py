"""A pytest fixture: a test that fails when a loop's accumulation is not the large batch's.

    def test_accumulation(audit_loop):
        with audit_loop(model, criterion, optimizer):
            my_training_step()

Loaded by pytest in every run where gaccum_exp is installed, so torch is imported by the first use.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gaccum_exp.audit.watch.watch import Watched

AuditLoop = Callable[..., "AbstractContextManager[Watched]"]


@pytest.fixture
def audit_loop() -> AuditLoop:
    """Return `watch` as an assertion: `with audit_loop(model, criterion, optimizer): ...`.

    The test fails, with the audit's report, unless every optimizer step in the block is sound: identical
    or equivalent, with no fault beside the gradient. So `inconclusive` fails, as does a block without a
    step. `stochastic=True` also allows steps that differ from the large batch's in the numbers drawn
    alone (dropout). Other arguments are those of `watch`.
    """
    return _audited


@contextmanager
def _audited(*args: Any, stochastic: bool = False, **options: Any) -> "Iterator[Watched]":
    from gaccum_exp.audit.watch.watch import watch

    with watch(*args, **options) as audit:
        yield audit
    if not audit.windows:
        pytest.fail(str(audit), pytrace=False)
    for number, window in enumerate(audit.windows):
        drawn = stochastic and window.verdict == "stochastic" and not window.checks
        if not (window.sound or drawn):
            only_drawn = window.verdict == "stochastic" and not window.checks
            hint = "\nallow it: audit_loop(..., stochastic=True)" if only_drawn else ""
            pytest.fail(f"optimizer step {number} of the block\n{window.report()}{hint}", pytrace=False)
