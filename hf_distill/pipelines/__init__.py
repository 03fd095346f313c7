"""Several steps in a row, each a folder that the next one reads: prune, distil, quantise."""

from hf_distill.pipelines.arguments import CompressConfig
from hf_distill.pipelines.compress import compress
from hf_distill.pipelines.report import CompressReport, StageRow


__all__ = ["CompressConfig", "CompressReport", "StageRow", "compress"]
