"""The conformance kit: what every part must keep, for the parts here and for parts of one's own.

    from vitdense.testing import check_head
    check_head(MyHead, width=64)

Each check builds the part small, on the CPU, in seconds, and raises an AssertionError that says
what is broken and how to mend it.
"""

from vitdense.testing.answers import check_head, check_model
from vitdense.testing.data import check_dataset, check_policy
from vitdense.testing.features import check_backbone, check_neck
from vitdense.testing.metrics import check_metric

__all__ = [
    "check_backbone",
    "check_dataset",
    "check_head",
    "check_metric",
    "check_model",
    "check_neck",
    "check_policy",
]
