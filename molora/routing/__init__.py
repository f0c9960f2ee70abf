"""How gates are made: scorers, links, selectors, prices, losses, schedules, and the trace of a forward. Torch only."""
