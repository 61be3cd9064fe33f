"""From the runs of a sweep to what they say: pair, compare, tabulate, draw.

Each step stands alone and reads only `RunRecord`s, so that it can be run again on an old sweep:
`compare.compare` pairs every arm with its reference and measures it, `compare.write_csv` writes the
numbers, `table.render` and `table.summary` show them, `figures.draw` draws them. Nothing here
knows where runs are stored. This file imports none of them: `--help` must not wait for torch.
"""
