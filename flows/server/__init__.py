"""The Prefect server of a workspace."""
