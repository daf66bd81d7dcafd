"""The inference worker: it answers the API's requests for predictions and generated text."""
