"""Backends of the ops: the same function names in each module (see `reference`, the oracle of every test)."""
