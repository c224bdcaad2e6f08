"""Processes that work together: ranks, agreement, gathering, signals, the watchdog, DeepSpeed files."""
