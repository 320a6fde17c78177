"""Loads anything that is an image, resizes it to tiles, and draws plans and boxes over it.

Imports only planning, host, config and errors.
"""
