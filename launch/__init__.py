"""Processes, HTTP, the front end and metrics."""
