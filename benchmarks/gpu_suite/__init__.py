"""Right, fast, end to end: everything that needs a GPU, in one command of under eight minutes."""
