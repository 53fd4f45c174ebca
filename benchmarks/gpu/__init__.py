"""Everything about the pack on a GPU, by one command on a machine without a network: see `__main__`."""
