"""`maxtext-ling2 doctor`: whether a LING2 run would work in this environment, and if not, why and what to do."""

from maxtext_ling2.doctor.checks import Diagnosis, Issue, diagnose
from maxtext_ling2.doctor.report import lines

__all__ = ["Diagnosis", "Issue", "diagnose", "lines"]
