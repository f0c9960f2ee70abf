"""Serving: one frozen base model, and many tenants with adapters or mixtures of their own."""
