"""The audit inside other people's frameworks: a callback each for Lightning and transformers, a fixture.

Nothing is imported here: each module needs its own framework and no other.
"""
