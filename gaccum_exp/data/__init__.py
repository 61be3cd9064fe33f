"""The built-in data sets: functions that return a map-style `torch.utils.data.Dataset`.

An image is a pair (input, target), a float32 tensor and a class index; a text is a dictionary with
`input_ids` and `labels`, and its data set has `lengths`. Every data set has an attribute `classes`, the
names of its classes or tokens in the order of their indices. What is the same each time that it is
read is fetched a micro-batch at a time by index (a plain `TensorDataset`, or `gather`); random
augmentation stays in the data set and draws from torch's global generator.
"""
