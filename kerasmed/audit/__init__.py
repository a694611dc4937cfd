"""What is wrong with a set of images before anything is learnt from it: copies, contradictions, leaks, shortcuts.

`identify` says which images are black, constant, or copies of one another; `find` lists what is wrong, `gate` refuses
to go on where it would spoil a result: call it before every training. `examine` does all this for any folder or
manifest, and `write` makes its report.
"""

from kerasmed.audit.findings import (
    FAILING,
    KINDS,
    MENDS,
    POLICIES,
    GateError,
    LeakError,
    check_accepted,
    crossing,
    deduplicate,
    find,
    gate,
    label_sets,
)
from kerasmed.audit.likeness import (
    SAME_ANATOMY,
    SAME_PICTURE,
    assign_groups,
    hash_pairs,
    identify,
    nearest,
    perceptual_hashes,
    similarity_groups,
    standardize,
)
from kerasmed.audit.report import Report, examine, index, write
from kerasmed.audit.shortcuts import by_class, class_means, classify, grey_levels, measure, probe

__all__ = [
    "FAILING",
    "KINDS",
    "MENDS",
    "POLICIES",
    "SAME_ANATOMY",
    "SAME_PICTURE",
    "GateError",
    "LeakError",
    "Report",
    "assign_groups",
    "by_class",
    "check_accepted",
    "class_means",
    "classify",
    "crossing",
    "deduplicate",
    "examine",
    "find",
    "gate",
    "grey_levels",
    "hash_pairs",
    "identify",
    "index",
    "label_sets",
    "measure",
    "nearest",
    "perceptual_hashes",
    "probe",
    "similarity_groups",
    "standardize",
    "write",
]
