"""The detection benchmark: does the guard keep its promise, what does it find, and what does it flag in error?"""
