"""Optimizers and learning-rate schedules that a `_target_` can name."""
