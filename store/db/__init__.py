"""The database: tables, states, sessions, pagination."""
