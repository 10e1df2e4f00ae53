"""The report of a run: `report.html` in its folder, one file that needs nothing else, to look at, to print, to mail."""
