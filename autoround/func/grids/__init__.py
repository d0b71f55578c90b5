"""Grids: the sets of values a weight may take, one module each behind one set of functions."""
