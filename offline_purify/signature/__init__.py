"""The signature method: what synthetic backdoors change in the suspicious model alike, and silencing those channels."""
