"""What is special about shipping a network with exits: its segments. The rest is the core's."""
