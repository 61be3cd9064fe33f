"""All controls: faults beside their sound versions, then sound loops of other styles."""

from experiments.negative_controls import (
    before_step,
    coupled,
    loss_scale,
    memory_and_report,
    moving_state,
    own_losses,
    several_passes,
    shapes,
    sound_losses,
    sound_steps,
    unequal_counts,
    window_edges,
)

CONTROLS = (
    *loss_scale.CONTROLS,
    *unequal_counts.CONTROLS,
    *window_edges.CONTROLS,
    *before_step.CONTROLS,
    *coupled.CONTROLS,
    *own_losses.CONTROLS,
    *several_passes.CONTROLS,
    *moving_state.CONTROLS,
    *shapes.CONTROLS,
    *memory_and_report.CONTROLS,
    *sound_losses.CONTROLS,
    *sound_steps.CONTROLS,
)
PAIRS = tuple(control for control in CONTROLS if control.faulty)
STYLES = tuple(control for control in CONTROLS if not control.faulty)
