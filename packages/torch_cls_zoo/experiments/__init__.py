"""The README's tables as experiments: rows, recipes, cells, and the page that shows them.

What belongs here starts trainings and measures networks to fill a table; nothing else imports it.
"""
