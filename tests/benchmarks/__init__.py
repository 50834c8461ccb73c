"""How fast `effens` is beside others that do the same: ``python tests/benchmarks/run.py`` times them in turns."""
