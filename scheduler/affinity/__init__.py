"""Expert-aware batching: which of the tokens that are ready to run together, so that fewer missing experts are read."""
