"""What a person sees of a run in Prefect's UI: a page per stage, training as it goes, and at the end the whole run.

Pages are Markdown (`markdown.py`), pictures in it are SVG (`../charts.py`). Only `board.py` and `live.py` talk to Prefect.
"""
