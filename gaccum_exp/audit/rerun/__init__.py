"""Runs of one window: on copies, in other orders and precisions, with its random draws replayed."""
