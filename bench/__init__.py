"""How fast it is: `python -m bench.sampling` and `python -m bench.training`, in the repository's root."""
