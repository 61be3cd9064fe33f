"""The built-in data sets: functions that return a map-style `torch.utils.data.Dataset`.

An item is a pair (input, target): a float32 tensor and a class index. Every data set has an
attribute `classes`, the names of its classes in the order of their indices. What is the same each
time that it is read comes as a plain `TensorDataset`, which is fetched a window at a time by index;
random augmentation stays in the data set and draws from torch's global generator.
"""
