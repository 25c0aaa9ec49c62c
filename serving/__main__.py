"""`python -m serving` is `headguard`."""

from serving.cli import main

main()
