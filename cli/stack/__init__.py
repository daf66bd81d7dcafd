"""The private servers of one machine: Postgres, Valkey, API and workers."""
