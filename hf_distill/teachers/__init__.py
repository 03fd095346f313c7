"""Teachers: whatever turns a batch into `TeacherSignals`."""

from hf_distill.quantization import prepare_quantized_student
from hf_distill.teachers.adapter import AdapterDisabledTeacher
from hf_distill.teachers.base import Teacher, check_same_task
from hf_distill.teachers.cached import CachedTeacher
from hf_distill.teachers.loading import load_teacher
from hf_distill.teachers.model import ModelTeacher, check_not_student
from hf_distill.teachers.vocabulary import check_vocabularies


__all__ = [
    "AdapterDisabledTeacher",
    "CachedTeacher",
    "ModelTeacher",
    "Teacher",
    "check_not_student",
    "check_same_task",
    "check_vocabularies",
    "load_teacher",
    "prepare_quantized_student",
]
