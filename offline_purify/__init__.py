"""The clinic: from the flagged requests of a case to a candidate adapter with a report.

``suspect`` opens a base with its suspicious adapter; ``flags`` reads the case; ``candidates`` guesses triggers;
``heads`` and ``countertraining`` repair; ``evaluation`` measures; ``gate`` decides what may be offered; ``report``
shows it; ``purify`` composes the stages and ``workflow`` makes them survive a killed process.
"""
