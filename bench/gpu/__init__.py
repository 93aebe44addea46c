"""What this package does on a CUDA device, in one command and a given time: `python -m bench.gpu --minutes 7`."""
