"""Imported once by the process that worlds are forked from: a rank then starts in no time."""

import torch

import moeyard.engine.engine
import moeyard.engine.parallel  # noqa: F401

torch.set_num_threads(1)
