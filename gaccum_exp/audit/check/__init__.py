"""Check a training script from outside: run it, judge its first windows, say what each N would take."""
