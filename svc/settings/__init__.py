"""Settings of this machine, from `svc.yaml`, the environment and the command line."""
