"""What a person sees of a run: in the terminal, in Prefect's UI, in its report."""
