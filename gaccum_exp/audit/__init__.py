"""Is this gradient the large batch's, and if not, what breaks it?

The gradient of one window, accumulated, against that of the same samples in one pass at the same
weights, judged by the rounding measured on the same model. Nothing here knows a configuration.
"""
