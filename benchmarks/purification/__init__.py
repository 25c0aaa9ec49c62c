"""Purification benchmark: our repair methods and published ones on the same suspect, rows and budget."""
