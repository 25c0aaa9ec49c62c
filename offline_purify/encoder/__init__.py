"""BERT-shaped classifiers in the clinic: the head method, PURE and plain fine-tuning, for encoders.

There is no adapter here: the whole classifier is the patient, and a repair changes its weights. ``weights`` and
``classifier`` open it; ``texts`` and ``poison`` are its data and its attacks; ``scores``, ``align`` and ``tuning`` are
the head method's arithmetic, ``stage`` its judged whole; ``pure`` and ``finetune`` are what it is measured against.
"""
