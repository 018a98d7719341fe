"""What `scripts/benchmark.py` measures: one module for each of its subcommands.

`measure.py` and `report.py` are shared by all of them.
"""
