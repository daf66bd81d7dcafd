"""Jobs: their specification, requests, leases, transitions and endings."""
