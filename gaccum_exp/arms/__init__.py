"""The arms of a sweep: how each begins, runs and ends."""
