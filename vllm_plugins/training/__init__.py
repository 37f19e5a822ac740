"""What every training command shares: image-text data, the training loop, its checkpoints.

A technique brings a module that turns a batch into a loss (:class:`.loop.Loss`) and its groups of
parameters; the order of the data, accumulation, resuming, logging and the picture of the curves
are here, once.
"""
