"""vLLM as an engine of the house: stock `vllm serve` with the guard let in. Nothing else in `serving` imports vllm.

endpoint.py     what vLLM loads into its API server: the /guard routes and the middleware
middleware.py   requests on their way in, answers on their way out
exchange.py     one HTTP request: what it asked for, the verdicts of its answers, what is to be said
tap.py          verdicts from the scheduler, taken before vLLM merges outputs; requests on their way to the engine
engine.py       revisions, profiles and status: the `/guard` routes' engine
launcher.py     `vllm serve` as a child process: started, watched, stopped with all that belongs to it
arguments.py    the command line and the environment that it is started with
"""
