"""The probe of the transformers engine: an attention function, a cache of slots, and a runner that batches
requests over it.
"""
