"""Attacks: synthetic backdoors whose triggers and targets are known, to make lab models and to test repairs.

Triggers and behaviours are combined freely; `poison` builds the training set. Nothing here trains or imports a model.
"""
