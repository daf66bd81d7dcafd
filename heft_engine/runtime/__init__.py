"""The process: devices, threads, memory, and directories written whole or not at all."""
