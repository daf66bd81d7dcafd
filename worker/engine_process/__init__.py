"""The engine as a child process: started, supervised and queried."""
