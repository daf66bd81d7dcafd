"""The database: sessions, tables, states, pages of lists."""
