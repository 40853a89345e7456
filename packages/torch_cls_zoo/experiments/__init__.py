"""The README's three tables as experiments: rows, recipes, runs, and the page that shows them."""
