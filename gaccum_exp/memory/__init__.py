"""Peak memory of one optimizer step: how much, when in the step, and of what."""
