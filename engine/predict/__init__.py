"""Predictors of routing: which experts a model will need, before its routers say so.

Predictions order reads and choose who makes room. What is computed is the routers' choice alone.
"""
