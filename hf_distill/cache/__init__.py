"""Soft labels on disk: a teacher is run once, and distilled from anywhere."""

from hf_distill.cache.build import build_cache
from hf_distill.cache.importing import Imported, import_distillkit
from hf_distill.cache.manifest import Manifest
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.remote import RemoteTeacher
from hf_distill.cache.verify import Verification, verify_cache


__all__ = [
    "CacheReader",
    "Imported",
    "Manifest",
    "RemoteTeacher",
    "Verification",
    "build_cache",
    "import_distillkit",
    "verify_cache",
]
