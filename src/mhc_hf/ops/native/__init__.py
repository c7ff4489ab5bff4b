"""C for CPUs, compiled on first use, and its launchers. Imported on first use only: `launch` is what the ops call."""
