"""Devices behind one protocol; ``select`` is the only entry point, and a backend's module loads when it is chosen."""
