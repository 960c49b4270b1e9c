"""Many processes as one run: start together, swap host data, end together."""
