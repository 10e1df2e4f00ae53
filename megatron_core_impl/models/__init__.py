"""The transformer, and one short module per family."""
