"""Messages between API and workers, over Redis."""
