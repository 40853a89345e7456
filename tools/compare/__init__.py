"""The journey from a folder of images and a budget to a measured table and a shipped winner.

What belongs here: checking and splitting the images (``check_data``), planning inside the minutes
(``plan``), making candidates by the projects' own commands (``making``), judging the files that
they leave (``judge``), choosing and shipping (``choose``, ``ship``) and the page (``page``). The
parts know one another by the files of a run and by :mod:`compare.contract`. Projects are started
as commands and never imported.
"""
