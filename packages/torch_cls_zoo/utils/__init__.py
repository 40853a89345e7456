"""Tools of the zoo, one idea a file."""
