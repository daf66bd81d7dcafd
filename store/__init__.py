"""The database, stored files and messages, which API and workers share."""
