"""The parts of `scripts/demo.py`.

`data`, `model` and `training` train a neural ODE on handwritten digits; `comparison`
examines its derivatives; `report` prints and draws the results. Timing, compilation,
memory and tables come from `scripts/benchmarks`.
"""
