"""Hugging Face checkpoints of LING2: names (`mapping.py`), config.json (`hf_config.py`), files (`hf_folder.py`), checks."""
