"""The loss contract `loss_fn(model, micro_batch) -> (loss_sum, denominator)` and what implements it."""
