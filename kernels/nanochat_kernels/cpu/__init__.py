"""The CPU backend: C sources, compiled once by the system's compiler into a cache, and called through ctypes."""
