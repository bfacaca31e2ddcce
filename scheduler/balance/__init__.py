"""Per-step balancing: which rank computes which rows of an expert in one layer of one step, and which weights move."""
