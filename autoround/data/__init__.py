"""Calibration data: from the text of ``--dataset`` to token batches."""
