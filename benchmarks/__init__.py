"""Benchmarks: the lab that makes small models, and the measurements of detection, overhead and repair."""
