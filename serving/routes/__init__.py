"""HTTP: thin routes that read a request, ask the module named after the noun, and write the answer."""
