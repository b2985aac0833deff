"""From an adapter to files that run on a CPU: merge, convert, quantize, verify."""
