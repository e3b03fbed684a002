"""What happens to a version in use, read from the metrics that the server exports."""
