"""Telemetry of a run: its log, and its readers: history, metrics, loggers, live view and report."""
