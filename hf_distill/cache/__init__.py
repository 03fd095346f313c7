"""Soft labels on disk: a teacher is run once, and distilled from anywhere."""

from hf_distill.cache.build import build_cache
from hf_distill.cache.manifest import Manifest
from hf_distill.cache.reader import CacheReader


__all__ = ["CacheReader", "Manifest", "build_cache"]
