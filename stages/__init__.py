"""The stages of the workflow: one module each, `python -m stages.<name> SPEC.json`, each in its own process."""
