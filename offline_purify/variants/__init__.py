"""Synthetic backdoors, implanted in a base on purpose: they teach the guard what a firing trigger looks like."""
