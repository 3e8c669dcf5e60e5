"""OCI images: fetched, checked, unpacked once, shared."""

from hutch.image.config import Credential, RegistryConfig
from hutch.image.store import ImageStore

__all__ = ["Credential", "ImageStore", "RegistryConfig"]
