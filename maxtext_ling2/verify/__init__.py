"""`maxtext-ling2 verify`: LING2 against recorded outputs of a reference, and a checkpoint against its source."""
