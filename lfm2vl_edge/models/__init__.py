"""Which files a model name means, how they are downloaded, and what they contain. May import image and planning."""
