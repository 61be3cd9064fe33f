"""Report what the runs of a sweep show: pair, compare, tabulate, draw.

Each step stands alone and reads only `RunRecord`s, so that it can be run again on an old sweep:
`compare.comparison.compare` pairs every arm with its reference and measures it, `write_csv` there writes
the numbers, `text.table` and `text.summary` show them, `figures.draw` draws them. Nothing here knows
where runs are stored. This file imports none of them: `--help` must not wait for torch.
"""
