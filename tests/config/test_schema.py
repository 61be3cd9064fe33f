"""Settings: what follows from what, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaccum_exp.config.batch_sizes import batch_sizes
from gaccum_exp.config.schema import DEFAULT_EPOCHS
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from tests.support import settings


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_micro_batch_is_the_largest_part_of_the_global_batch(batch: int, steps: int) -> None:
    """Global batch and N set: what the split really does is what is said."""
    if steps > batch:
        with pytest.raises(BadInputError, match=rf"global_batch_size={batch} .*accum.steps={steps} "):
            batch_sizes(batch, None, steps)
        return
    assert batch_sizes(batch, None, steps) == (batch, max(split_sizes(batch, steps)), steps)


@given(st.integers(1, 500), st.integers(1, 500))
def test_a_micro_batch_size_is_never_exceeded(batch: int, micro: int) -> None:
    """Global batch and micro-batch set: N is the least that keeps to it."""
    _, largest, steps = batch_sizes(batch, micro, None)
    assert largest <= micro
    assert steps == 1 or batch / (steps - 1) > micro


def test_n_multiplies_the_micro_batch_where_no_global_batch_is_set() -> None:
    """The seed's loop."""
    assert batch_sizes(None, 32, 4) == (128, 32, 4)


def test_three_sizes_that_do_not_fit_are_refused_with_all_three_numbers() -> None:
    """And three that fit are fine."""
    assert batch_sizes(33, 9, 4) == (33, 9, 4)
    with pytest.raises(BadInputError, match=r"=256, .*=32 and accum.steps=4 do not fit"):
        batch_sizes(256, 32, 4)


@pytest.mark.parametrize("given_sizes", [(None, None, 4), (256, None, None), (None, None, None)])
def test_two_of_the_three_are_needed(given_sizes: tuple[int | None, ...]) -> None:
    """One alone determines nothing."""
    with pytest.raises(BadInputError, match="set two of"):
        batch_sizes(*given_sizes)


def test_derived_values_are_what_is_recorded() -> None:
    """The dotted parameters hold what the run did, not the nulls it was given."""
    flat = settings("data.global_batch_size=100", "accum.steps=7").flat()
    assert flat["data.micro_batch_size"] == 15
    assert flat["train.epochs"] == DEFAULT_EPOCHS
    assert flat["accum.reduction"] == "global_mean"
    assert flat["model.norm"] == "group"
    flat = settings("data.micro_batch_size=50", "data.global_batch_size=100", "accum.steps=null").flat()
    assert flat["accum.steps"] == 2


def test_seed_zero_is_a_seed() -> None:
    """And no other value is put in its place."""
    assert settings("seed=0").seed == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("accum.reduction=men", "accum.reduction=men: not one of .* did you mean 'mean'"),
        ("accum.sum_scale=no", "accum.sum_scale=no: not one of constant, none"),
        ("accum.partial_window=dorp", "did you mean 'drop'"),
        ("task=tran", "did you mean 'train'"),
        ("task=audits", "task=audits: not one of train, audit, plan, advise, did you mean 'audit'"),
        ("audit.every_steps=0", "audit.every_steps=0: must be at least 1"),
        ("audit.controls=-1", "audit.controls=-1: must be 0 to 1,000, since each"),
        ("+audit.every_step=3", "audit.every_step: no such key, did you mean 'every_steps'"),
        ("accum.steps=0", "accum.steps=0: must be at least 1"),
        ("accum.steps=-2", "accum.steps=-2: must be at least 1"),
        ("data.global_batch_size=1.5", "data.global_batch_size=1.5: not an integer"),
        ("data.workers=-1", "data.workers=-1"),
        ("data.eval_batch_size=0", "data.eval_batch_size=0"),
        ("data.workers=null", "data.workers=None: not an integer"),
        ("data.eval_batch_size=null", "data.eval_batch_size=None: not an integer"),
        ("data.eval=3", "data.eval=3: not a mapping"),
        ("train.epochs=0", "train.epochs=0: must be at least 1"),
        ("train.eval_every_steps=0", "train.eval_every_steps=0"),
        ("runtime.threads=0", "runtime.threads=0"),
        ("+accum.stepz=3", "accum.stepz: no such key, did you mean 'steps'"),
        ("+seeed=3", "seeed: no such key, did you mean 'seed'"),
        ("+data.worker=3", "data.worker: nothing in data.train or data.eval uses it, .*'workers'"),
        ("model=custom", "model._target_ must be set"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_key(override: str, said: str) -> None:
    """One line, with the nearest valid value where there is one."""
    with pytest.raises(BadInputError, match=said):
        settings(override)


def test_two_training_lengths_are_refused() -> None:
    """Which of the two was meant cannot be known."""
    with pytest.raises(BadInputError, match=r"train.steps=3 and train.epochs=2"):
        settings("train.steps=3", "train.epochs=2")


def test_figures_have_a_width_and_formats() -> None:
    """A name or inches; one format or several; and nothing of it is what an arm is compared by."""
    assert (settings().figures.width, settings().figures.format) == ("double", ["svg"])
    asked = settings("figures.width=4.5", "figures.format=pdf").figures
    assert (asked.width, asked.format) == (4.5, ["pdf"])
    assert settings("figures.width=talk", "figures.format=[pdf,svg]").figures.format == ["pdf", "svg"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("figures.width=dubble", r"figures.width=dubble: not one of single, double, talk.*double"),
        ("figures.width=90", "figures.width=90: must be single, double, talk, or 2 to 40 inches"),
        ("figures.width=null", "figures.width=None: must be"),
        ("figures.format=jpg", "figures.format=jpg: not one of svg, png, pdf"),
        ("figures.format=[]", r"figures.format=\[\]: must be a list out of svg, png, pdf"),
    ],
)
def test_figures_that_cannot_be_drawn_are_refused(override: str, said: str) -> None:
    """With what there is."""
    with pytest.raises(BadInputError, match=said):
        settings(override)
