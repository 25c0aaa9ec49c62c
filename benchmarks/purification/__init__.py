"""Purification benchmark: our repair methods and published ones on the same adapter, rows and budget."""
