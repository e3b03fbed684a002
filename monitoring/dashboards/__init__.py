"""The Grafana dashboards, as Grafana exports them, and the command that copies them."""
