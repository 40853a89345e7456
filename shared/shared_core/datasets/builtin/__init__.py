"""Images that need no files: drawn scenes and scikit-learn's digits."""
