"""Checkpoints: a training on disk, anywhere in it, so that an interrupted one goes on where it was."""
