"""Who learns, who calibrates, who tests: splits, the manifest that holds one, data made ready."""
