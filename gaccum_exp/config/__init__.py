"""The configuration: schema, batch sizes, targets, and Hydra's errors in a line."""
