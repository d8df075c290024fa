"""The fault run: the real stack as processes, faults, and a checker of what everybody saw."""
