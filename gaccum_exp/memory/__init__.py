"""Peak memory of one optimizer step: its size, its moment and its categories."""
