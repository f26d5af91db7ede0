"""The experts of a mixture: what their grouped products need to know of a chip."""
