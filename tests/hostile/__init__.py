"""Hostile data for `rl.fit_linear`, and certificates that know nothing of the library."""
