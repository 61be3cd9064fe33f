"""Causes of a difference between the accumulated gradient and the large batch's."""
