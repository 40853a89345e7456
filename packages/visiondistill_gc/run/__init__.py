"""A run of the recipe: its stages one after the other, the evaluation, the record, the report."""
