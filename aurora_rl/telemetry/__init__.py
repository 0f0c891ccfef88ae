"""What a run says of itself: its log, rates, statistics, report and live view."""
