"""One window, run again: on copies, in other orders and precisions, with its random draws replayed."""
