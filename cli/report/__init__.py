"""Reports of a study as JSON, Markdown, and an HTML page with plots, made by the command from the API's data."""
