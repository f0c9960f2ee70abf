"""The engine: a queue, a thread, and what it says to its backends."""
