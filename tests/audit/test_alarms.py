"""No false alarm and no miss, over random configurations; the counts are printed and recorded."""

import warnings
from collections import Counter
from collections.abc import Callable

import pytest

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.result import Audit
from gaccum_exp.core.reductions import reduction_named
from tests.audit.configurations import ORDERED, Configuration, faulty, mixing, sound
from tests.shortened import shortened

CASES = shortened([40, 200], [40])
Record = Callable[[str, object], None]


def audit(configuration: Configuration) -> Audit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stranger's model may warn; what is asked is the verdict
        return audit_window(
            configuration.model,
            configuration.loss_fn,
            configuration.window,
            reduction=reduction_named(configuration.reduction),
        )


def judged(make: Callable[[int], Configuration], cases: int) -> dict[str, list[str]]:
    """Return the configurations by verdict."""
    found: dict[str, list[str]] = {}
    for seed in range(cases):
        configuration = make(seed)
        result = audit(configuration)
        said = f"seed {seed}: {configuration.name}: {result.cause}, {result.detail}"
        found.setdefault(result.verdict, []).append(said)
    return found


def recorded(found: dict[str, list[str]], what: str, record_property: Record) -> None:
    counts = Counter({verdict: len(cases) for verdict, cases in found.items()})
    record_property(what, dict(counts))
    print(f"{what}: {dict(counts)}")


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES)
def test_no_sound_configuration_is_accused(cases: int, record_property: Record) -> None:
    """None is called biased or stochastic, and hardly any is left open."""
    found = judged(sound, cases)
    recorded(found, "sound", record_property)
    assert found.get("biased", []) + found.get("stochastic", []) == []
    assert len(found.get("inconclusive", [])) <= cases // 20, found["inconclusive"]


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES)
def test_no_faulty_configuration_is_missed(cases: int, record_property: Record) -> None:
    """None is called equivalent or identical, and hardly any is left open."""
    found = judged(faulty, cases)
    recorded(found, "faulty", record_property)
    assert found.get("equivalent", []) + found.get("identical", []) + found.get("stochastic", []) == []
    assert len(found.get("inconclusive", [])) <= cases // 20, found["inconclusive"]


def test_what_depends_on_the_order_of_samples_is_missed_neither(record_property: Record) -> None:
    """Other orders of the samples move the one pass as far, and that is no rounding."""
    found = judged(lambda seed: mixing(seed, ORDERED), 40)
    recorded(found, "order", record_property)
    assert found.get("equivalent", []) + found.get("identical", []) + found.get("stochastic", []) == []
