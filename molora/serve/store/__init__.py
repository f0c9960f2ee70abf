"""The adapter store: from disk over memory into the slots of a served model."""
