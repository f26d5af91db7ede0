"""Operations of the LING2 model: ordinary JAX functions that know nothing of MaxText."""
