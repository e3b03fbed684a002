"""The Grafana dashboards, in Grafana's export format, and the command that copies them."""
