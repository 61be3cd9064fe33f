"""Denoise sine waves of unequal lengths: a model, data and a loss of one's own."""
