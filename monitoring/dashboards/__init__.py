"""Grafana dashboards in Grafana's export format, and the command that writes them to files."""
