"""The runner of a machine, and what it deploys."""
