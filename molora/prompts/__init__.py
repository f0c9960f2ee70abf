"""Choosing adapters by the prompt: embedders, selectors that are fitted on examples, guards that abstain, bandits."""
