"""Records that outlive processes."""

from hutch.state.sqlite import BoxRecord, SnapshotRecord, Store, VolumeRecord

__all__ = ["BoxRecord", "SnapshotRecord", "Store", "VolumeRecord"]
