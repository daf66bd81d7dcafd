"""The API's side of messages to the inference workers."""
