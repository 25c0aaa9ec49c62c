"""The gateway: the OpenAI API in front of a guarded engine, and what an operator does when the guard speaks up."""
