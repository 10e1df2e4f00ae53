"""How a stage process is started."""
