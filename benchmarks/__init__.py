"""Speed and scale, measured beside what llama.cpp can do on the same machine in the same minutes.

Never part of the test run. A scenario is one module with one function that measures, and one command in `__main__`.
"""
