"""The commands of `finetune`, one module per subject. `flows/cli.py` puts them together."""
