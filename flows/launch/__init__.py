"""How a stage process is started: one small protocol (`protocol.py`), one file per way of doing it."""
