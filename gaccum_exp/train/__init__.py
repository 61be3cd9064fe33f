"""A training: built from settings, run window by window, and observed by hooks."""
