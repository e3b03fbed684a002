"""Grafana dashboards as code: `svc dashboards` makes deploy/grafana/dashboards from this package."""
