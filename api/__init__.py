"""The REST API: OpenAI-compatible fine-tuning, models and completions, and HEFT's studies and /predict."""
