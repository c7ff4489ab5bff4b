"""C for CPUs: `build` compiles it on first use, `launch` is what the ops call."""
