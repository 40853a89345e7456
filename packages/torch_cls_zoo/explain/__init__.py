"""Why a network says what it says: class activation maps, the layer they look at, their pictures.

What belongs here reads a trained network and changes nothing; nothing here knows of runs.
"""
