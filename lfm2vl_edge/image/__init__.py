"""Turns anything that is an image into tiles, and draws plans and boxes over images; imports planning and below."""
