"""The seeds of an arm in one job: trained as one where that is sound, else one after the other.

Each is the arm that it would have been alone: its own configuration, its own folder below the job's, its
own run. A sweep makes such jobs under `sweep.vectorize=seed` (`gaccum_exp/arms/callback.py`).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from gaccum_exp.arms import plan as planning
from gaccum_exp.arms.child import Ended
from gaccum_exp.arms.context import ArmContext, contexts_of_seeds, label_of
from gaccum_exp.arms.life import EXPECTED, VECTORIZED, Life, ends, reason_of, refuse_arm
from gaccum_exp.arms.process import SPENT
from gaccum_exp.arms.resume import runs_in
from gaccum_exp.arms.run_arm import clear, may_go_on, run_arm, shared_data, train_controls
from gaccum_exp.config import schema as config
from gaccum_exp.config.schema import Settings
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.plan import size
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.train.build import load
from gaccum_exp.train.stackable_seeds import NotStackableError, stackable
from gaccum_exp.train.stacked_seeds import StackedState, train_stacked
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import Stop

log = logging.getLogger(__name__)


def run_job(context: ArmContext, stop: Stop) -> Ended:
    """Run the arms of a sweep's job, one or those of several seeds; return how they ended.

    Raises:
        StoppedError: somebody wants the sweep to end.
    """
    try:
        settings = config.validate(context.config)
    except BadInputError as error:
        return Ended({one.folder: refuse_arm(one, error) for one in contexts_of_seeds(context)})
    if settings.sweep.seeds is not None:
        return run_seeds(context, stop)
    return Ended({context.folder: run_arm(context, settings, stop)})


def run_seeds(context: ArmContext, stop: Stop) -> Ended:
    """Run the arm of every seed in `sweep.seeds` as one, where that is sound."""
    contexts = contexts_of_seeds(context)
    left = [run for one in contexts for run in runs_in(one.folder) if run.sweep_id == one.sweep_id]
    if any(may_go_on(run, context) for run in left):
        return Ended(apart=True)  # each goes on from where it is
    settings = [config.validate(one.config) for one in contexts]
    lives = [Life(one, own, stop=stop) for one, own in zip(contexts, settings, strict=True)]
    try:
        with stop.at_once():
            states = _stackable_states(settings)
        _train_together(lives, states, stop)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # before any of them has begun
        if not isinstance(error, (NotStackableError, *EXPECTED)):
            SPENT.set()
        if not isinstance(error, BadInputError):  # each arm will report that itself
            why = error if isinstance(error, NotStackableError) else reason_of(error)
            log.warning(
                "sweep.vectorize=seed: not for this arm: %s; its seeds are trained one after the other",
                why,
            )
        return Ended(apart=True)
    for life in lives:
        train_controls(life)
    return Ended({life.context.folder: life.outcome for life in lives if life.outcome is not None})


def _stackable_states(settings: Sequence[Settings]) -> list[TrainState]:
    """Build the trainings of seeds that can be trained as one.

    Raises:
        NotStackableError: they cannot, or not in the memory that there is.
        BadInputError: neither together nor alone.
    """
    first, seeds = settings[0], len(settings)
    if first.task != "train":
        raise NotStackableError(f"task={first.task} trains nothing")
    clear()
    loaded = load(first, shared_data(first.sweep_id))
    first = loaded.in_stages(first)
    budget = planning.budget_bytes(first, loaded.device)
    states = stackable(settings, loaded)
    if budget is None or planning.plainly_fits(states[0], budget // seeds):
        return states
    predicted = planning.predicted_peak(first, loaded)
    if predicted is not None and seeds * predicted.bytes > budget:
        raise NotStackableError(
            f"{seeds} seeds at once are predicted to hold {size(seeds * predicted.bytes)}, of "
            f"{size(budget)} that they may"
        )
    return states


def _train_together(lives: Sequence[Life], states: Sequence[TrainState], stop: Stop) -> None:
    """Train as one; what goes wrong beyond one seed ends all that are not over yet."""
    seeds, total_steps = len(lives), states[0].total_steps
    with ends(*lives):
        for life, state in zip(lives, states, strict=True):
            life.settings = state.settings
            life.begin({VECTORIZED: f"{seeds} seeds"})
            life.describe(state)
            if life is lives[0]:
                life.sink.ready()  # what is wrong with the store is wrong for all
        with _progress(lives, total_steps) as progress:
            together = StackedState(states)
            results = train_stacked(together, [life.sink for life in lives], progress, stop)
        for life, state, result in zip(lives, states, results, strict=True):
            with ends(life):
                if result.error is not None:
                    raise result.error
                life.keep_weights(state)
                life.finish(None if result.audit is None else result.audit.verdict)


def _progress(lives: Sequence[Life], total_steps: int) -> Progress:
    context = lives[0].context
    own = [key for key in context.swept_keys if key != "seed"]
    label = label_of(replace(context, swept_keys=tuple(own)), lives[0].settings, f"{len(lives)} seeds")
    turn = context.turn
    following_s = turn.following_s if turn is not None and turn.left is not None else None
    return Progress(label, total_steps, alone=context.owns_terminal, following_s=following_s)
