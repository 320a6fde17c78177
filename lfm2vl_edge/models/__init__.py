"""Which files a model name means, how they are downloaded, and what they say.

May import image and below.
"""
