"""Checkpoint layouts: one module each, a registry by name, and the one writer that does all work on files."""
