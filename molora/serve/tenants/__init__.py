"""Tenants: keys, rights, quotas and usage, in a database that several servers may share."""
