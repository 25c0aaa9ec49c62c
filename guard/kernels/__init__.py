"""Kernels that turn queries and keys into the guard's rows: a plain torch reference, and faster twins checked
against it.
"""
