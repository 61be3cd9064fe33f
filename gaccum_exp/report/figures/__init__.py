"""A comparison as figures."""
