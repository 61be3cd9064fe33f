"""Audit of any training loop: its windows are taped, played back and judged."""
