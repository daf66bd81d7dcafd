"""The checks of a request before its route: host, key, and the bounds of its body."""
