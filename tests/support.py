"""What several tests need: compose a configuration, train without a store."""

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from gaccum_exp.audit.result import Audit
from gaccum_exp.config import schema as config
from gaccum_exp.config.files import blocks
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.feed import Window
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import Point, Sink
from gaccum_exp.train.build import build
from gaccum_exp.train.hooks import Values
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("model=mlp", "model.hidden=[8]", "runtime.device=cpu")
STRANGER = (
    "model=custom",
    "model._target_=tests.strangers.Net",
    "data=custom",
    "data.train._target_=tests.strangers.Points",
    "runtime.device=cpu",
)


def composed(*overrides: str) -> DictConfig:
    """Compose a configuration as the command line does; what is chosen of the blocks is read once."""
    values = [o for o in OverridesParser.create().parse_overrides(list(overrides)) if _is_value(o)]
    lines = {value.input_line for value in values}
    found = copy.deepcopy(_chosen(*(override for override in overrides if override not in lines)))
    ConfigLoaderImpl._apply_overrides_to_config(values, found)  # Hydra's own last step
    return found


@functools.cache
def _chosen(*overrides: str) -> DictConfig:
    config.register()
    with initialize_config_dir(config.conf_dir(), version_base="1.3"):
        return compose("config", list(overrides))


def _is_value(override: Override) -> bool:
    chosen = {*blocks(), "hydra.searchpath"}
    return override.package is None and override.key_or_group not in chosen


def settings(*overrides: str) -> Settings:
    """Compose and validate as the command line does."""
    return config.validate(composed(*overrides))


class Collected(Sink):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []
        self.tags: dict[str, str] = {}

    def send(self, points: list[Point]) -> None:
        """Keep them."""
        self.points += points

    def describe(self, tags: dict[str, str]) -> None:  # type: ignore[override]
        """Keep them."""
        self.tags |= tags

    def curve(self, metric: str) -> list[float]:
        """Return a metric's values in order."""
        return [p.values[metric] for p in self.points if metric in p.values]


def trained(*overrides: str) -> tuple[TrainState, Collected]:
    """Train to the end; return what was built and what was recorded."""
    state, sink = build(settings(*overrides)), Collected()
    with Progress("test", state.total_steps) as progress:
        train_to_end(state, sink, progress)
    return state, sink


def train_to_end(
    state: TrainState, sink: Sink, progress: Progress, budget_bytes: int | None = None
) -> Audit | None:
    """Train to the end with a run's own hooks; return its worst audit."""
    hooks, audits = hooks_of(state, sink, progress, budget_bytes=budget_bytes)
    train(state, hooks)
    sink.deliver()
    return audits.worst


def step_at(state: TrainState, window: Window, global_step: int = 0) -> Values:
    """Take the optimizer step of one window."""
    state.global_step = global_step
    return take_step(state, window)
