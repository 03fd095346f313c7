"""Why a student does not follow its teacher."""

from hf_distill.evaluation.diagnostics.diagnose import diagnose
from hf_distill.evaluation.diagnostics.gradients import logged_shares
from hf_distill.evaluation.diagnostics.report import Diagnosis, Finding


__all__ = ["Diagnosis", "Finding", "diagnose", "logged_shares"]
