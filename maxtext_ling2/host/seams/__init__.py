"""What LING2 changes in MaxText, one seam per file; `plugin.py` lists them all in the order in which they act."""
