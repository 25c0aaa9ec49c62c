"""The probe of vLLM: a plugin that wraps every attention layer of a worker, plans which rows are watched, and sends
verdicts the scheduler's way.

    plugin.py     what vLLM loads in each of its processes: the version gate and the patches
    support.py    what cannot be measured is refused here, by name
    probe.py      one worker's probe: the plan of a step, the rows, the readings, the notes
    requests.py   a watched request, from its first chunk of prompt to its verdict
    scheduling.py notes on their way out, and requests that are stopped
    recorded.py   what a worker recorded, on its way between processes
    measure.py    many prompts through vLLM offline
    calibrate.py  clean prompts in, a profile for vLLM out
"""
