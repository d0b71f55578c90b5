"""The command line: flags generated from ``Recipe``, refusals, progress. Nothing here imports torch."""
