"""What a person asks for: configuration, parameters of a flow, and what follows from them. None of it needs Prefect."""
