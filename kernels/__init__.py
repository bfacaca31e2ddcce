"""Maths on tensors. Imports nothing else of this package."""
