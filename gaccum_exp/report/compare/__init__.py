"""Runs of a sweep paired with their references and measured against them."""
