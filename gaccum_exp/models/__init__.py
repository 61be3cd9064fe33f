"""The built-in models, each a `torch.nn.Module` whose constructor takes plain values.

Constructors take `input_shape` (the shape of one sample's input, without a batch dimension) and
`num_classes` (the number of outputs), or `vocab_size` (the number of tokens). Each may be left null in
a model's YAML file, and is then filled in from the data set. Nothing here reads a configuration: a
custom model is used in the same way, by its `_target_`.
"""
