"""What is true of a data set: its facts with their sources, and the check of files against them."""
