"""The archive: where old log entries go, in an object store; and the log read from both places as one.

What is put there never changes. Under ``ns-NAMESPACE/c-CONVERSATION/GENERATION/`` lie segments (entries of the log)
and manifests (which segments there are); the head in the store names the one manifest that counts.
"""

from __future__ import annotations

from convener.store.archive.archive import Archive
from convener.store.archive.objects import Objects, open_objects
from convener.store.archive.reader import LogReader
from convener.store.archive.segments import Manifest, Segment, SegmentRef, writer_of

__all__ = ["Archive", "LogReader", "Manifest", "Objects", "Segment", "SegmentRef", "open_objects", "writer_of"]
