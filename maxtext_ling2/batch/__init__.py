"""`maxtext-ling2 batch`: a training batch as text, with its loss marked."""
