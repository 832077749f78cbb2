"""Processes, logs, seeds, plots."""
