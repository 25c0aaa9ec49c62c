"""What the probe kernels cost next to the decode step they accompany: `python -m benchmarks.kernels --help`."""
