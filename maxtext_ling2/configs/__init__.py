"""LING2's configuration: fields (`fields.py`), rules (`validation.py` and the files it calls), models (`models/*.yml`)
and training recipes (`recipes/*.yml`).

Nothing here imports MaxText.
"""
