"""Decisions: pure functions over integers, without a model, a device or a clock of their own."""
