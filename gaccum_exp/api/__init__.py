"""The command line as functions of Python: `sweep` and `compare`."""
