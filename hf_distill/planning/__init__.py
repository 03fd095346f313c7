"""What a run needs before it is started: parameters, FLOPs and memory, from configs alone."""

from hf_distill.planning.choice import Way, ways
from hf_distill.planning.gap import gap_note
from hf_distill.planning.parameters import ParameterCount, parameter_count
from hf_distill.planning.planner import plan
from hf_distill.planning.report import Plan


__all__ = ["ParameterCount", "Plan", "Way", "gap_note", "parameter_count", "plan", "ways"]
