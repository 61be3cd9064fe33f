"""Audit of a gradient: is it the large batch's, and if not, what is the cause?

The accumulated gradient of a window is compared with that of the same samples in one pass at the same
weights, and judged by the rounding measured on the same model. Nothing here knows a configuration.
"""
