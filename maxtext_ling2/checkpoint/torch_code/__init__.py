"""The PyTorch code that an exported Hugging Face folder carries; it is copied there, and nothing here imports it."""
