"""A library of adapters: cards, versions, checks and search, and the mixtures made from it."""
