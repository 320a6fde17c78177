"""`python -m lfm2vl_edge` is the command line."""

from lfm2vl_edge.cli import main

main()
