"""LING2's model in Flax NNX, built from MaxText's layers where they are right.

Shapes: B batch, T sequence, C hidden, H heads, D head dimension, E experts.
"""
