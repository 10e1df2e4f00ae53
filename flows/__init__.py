"""Prefect: what runs, in which order, where."""
