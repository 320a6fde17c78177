"""Whether this machine is well set up and how fast it is: doctor, tune, bench."""
