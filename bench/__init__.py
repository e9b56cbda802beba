"""Numbers, each with the command that prints it: `python -m bench CASE --out DIR`."""
