"""Operations of the LING2 model: ordinary JAX functions, independent of MaxText."""
