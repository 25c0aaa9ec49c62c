"""The lab: small models and backdoors made here from a seed, so that every claim can be tested offline."""
