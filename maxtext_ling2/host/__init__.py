"""The host layer: how MaxText is extended at run time, and the only code that knows MaxText's insides.

A seam is one place where MaxText is extended (`seams/`, one per file). It states what it needs from MaxText
(`contract.py`), and the registry (`registry.py`) applies all seams or none. Nothing here imports jax, pydantic or MaxText
at module level: the seams act when MaxText's own modules are imported.
"""
