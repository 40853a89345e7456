"""The names that options may take and that code below them knows; no framework is imported here."""

SCALES = ("auto", "full", "short", "finetune", "rehearsal")
SETS = ("AID", "NaSC", "NWPU", "PatternNet", "UCM")
STAGES = ("prepare", "backbone", "distil", "labels", "exits", "evaluate")
ISOTROPIC_ARCHS = ("gfnet-ti", "gfnet-xs", "gfnet-s", "gfnet-b")  # one grid in all blocks
PYRAMID_ARCHS = ("gfnet-h-ti", "gfnet-h-s", "gfnet-h-b")  # four stages: teachers, no exits
LITE_ARCHS = ("lite0", "lite1", "lite2")  # trained on ImageNet: teachers, and with exits
FILTERS = ("auto", "fft", "dft", "dft-dense")
TRANSFERS = ("official", "spectrum")
GATES = ("unc", "identity")
OBJECTIVES = ("ce", "zeroOne", "prob")
LIVE, STORED = "live", "stored"  # how a teacher's answers are had
ANSWERS = (LIVE, STORED)
HEAD_LOSSES = ("single", "weighted", "boosted", "legacy")
PHASE2 = ("exits", "backbone", "joint")
RULES = ("gate", "jei", "max_prob", "entropy", "margin", "patience")
LEARNED_RULES = ("gate", "jei")  # they ask the gates
POINTS = ("careful", "balanced", "fast")  # wishes that a run finds thresholds for
DEFAULT_POINT = "balanced"
ALL = "all"  # --exits all: one after every block but the last
