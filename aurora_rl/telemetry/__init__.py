"""What a run says of itself: its log and what follows it: history, metrics, loggers, live view and report."""
