"""Messages between the API and the workers, over Redis."""
