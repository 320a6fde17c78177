"""From anything that is an image to tiles, and back to images for people.

May import planning and below.
"""
