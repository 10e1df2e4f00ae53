"""A run while it lasts."""
