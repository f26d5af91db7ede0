"""The host layer: how MaxText is extended at run time, and the only code that changes MaxText.

A seam is one place where MaxText is extended (`seams/`, one per file). It states what it needs from MaxText
(`contract.py`) and which LING2 runs need it (`seam.py`); the registry (`registry.py`) applies and undoes seams. Nothing
here imports jax, pydantic or MaxText at module level: the seams act when MaxText's own modules are imported.

`model/` and `training/` import only these of it: `contract.Expectation` and `expect`, `seams.weight_variables.MARK` (the
metadata key of variables that are stored with the weights) and `step_globals.patched_globals`.
"""
