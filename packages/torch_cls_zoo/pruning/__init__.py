"""Making a network narrower: slimming its scales, finding which channels hang together, cutting.

What belongs here changes a network's layers and proves what it did; nothing here knows of runs.
"""
