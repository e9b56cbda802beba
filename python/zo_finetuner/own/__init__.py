"""The user's own data and objectives: what `zo train` takes besides the eleven tasks."""
