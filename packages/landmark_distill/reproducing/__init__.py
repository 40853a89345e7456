"""The recipes on images that anybody can have: what is run, compared and reported."""
