"""What measures. `python -m bench PART` prints figures, and fails where a ratio has collapsed."""
