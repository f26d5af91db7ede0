"""`maxtext-ling2 generate` and `eval`: text from a saved model, and its loss on text."""
