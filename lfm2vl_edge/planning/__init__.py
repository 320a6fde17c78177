"""What an image will take, in integers and seconds, before a pixel is touched.

May import errors, config and host.
"""
