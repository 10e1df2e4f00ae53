"""What flows and stages agree on: the configuration, every stage's spec, every artifact. No torch, no Prefect in here."""
