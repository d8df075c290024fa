"""What measures. `python -m bench.NAME`; prints figures and asserts none."""
