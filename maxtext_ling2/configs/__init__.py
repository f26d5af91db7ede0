"""LING2's configuration: its fields (`fields.py`), its rules (`validation.py`) and its models (`models/*.yml`).

Nothing here imports MaxText; the host layer brings it there.
"""
