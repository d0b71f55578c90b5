"""What users of Intel's auto-round type: their flags, schemes and Python calls, translated or refused by name."""
