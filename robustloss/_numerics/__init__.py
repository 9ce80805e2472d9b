"""What only sums, sorts, integrates or factorises: it knows nothing of losses and fits."""
