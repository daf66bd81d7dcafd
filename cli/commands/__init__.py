"""The subcommands of `heft`."""
