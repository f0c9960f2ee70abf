"""Backends: what turns running jobs into tokens, one forward at a time."""
