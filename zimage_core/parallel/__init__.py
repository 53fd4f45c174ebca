"""One image over several devices, a process on each."""
