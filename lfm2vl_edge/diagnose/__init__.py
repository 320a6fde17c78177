"""Whether this machine is well set up and how fast it is: doctor, tune, bench.

May import everything but the command line.
"""
