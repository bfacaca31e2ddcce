"""Measurements. Every claim of speed is a command here."""
