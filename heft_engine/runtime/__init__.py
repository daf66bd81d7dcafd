"""Process-level services: devices and memory, malloc, threads, sealed directories."""
