"""The parallel model package: models, parallelism, data and checkpoints. It knows nothing of stages, flows or files of ours.

Importing this package, its `config` and its `models.<family>` modules does not import torch, so that a layout can be
checked before any process starts.
"""

__version__ = "0.1.0"
