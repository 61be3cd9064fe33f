"""A comparison in words: tables, sentences and notes."""
