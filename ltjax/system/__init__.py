"""The machine: cores, devices, processes, paths and signals, and how XLA compiles."""
