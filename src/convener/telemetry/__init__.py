"""What operators see: the names of all metrics in one place."""
