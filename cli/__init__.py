"""The `heft` command: runs the service, and uses it over HTTP."""
