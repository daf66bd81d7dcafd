"""The engine's command line: arguments to calls, events and answers to JSON lines. No logic of its own."""
