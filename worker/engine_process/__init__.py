"""The engine as a child process: started, supervised, asked."""
