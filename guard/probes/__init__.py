"""Probes: the only places where the guard touches an engine. One package per engine; nothing else imports its
library.
"""
