"""The audit in other frameworks: a callback for Lightning, one for transformers, a pytest fixture.

Nothing is imported here: each module needs its own framework and no other.
"""
