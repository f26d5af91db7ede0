"""Hugging Face checkpoints: names (`mapping.py`), config.json (`hf_config.py`), files (`hf_checkpoint.py`)."""
