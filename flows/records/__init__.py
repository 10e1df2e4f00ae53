"""What is known of runs, in their folders. None of it needs Prefect."""
