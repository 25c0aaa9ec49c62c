"""The embedded engine: transformers in this process, continuous batching, verdicts while generating, OpenAI HTTP
on top.
"""
