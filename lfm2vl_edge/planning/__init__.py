"""Decides the views of an image in integers, and predicts their cost in seconds and bytes, without any pixels.

Imports only errors, config and host.
"""
