"""Published purification methods that ours are measured against: one file each, one interface, one budget.

A baseline is a function (suspect, material, budget) that changes the suspect's adapter, or a whole model, in place and
returns what it did, JSON-able. None of them looks at flags: they know the suspect and clean rows, nothing of the
trigger.
"""
