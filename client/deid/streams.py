"""What hides inside pixel data: comments in compressed streams, bytes behind the picture's end.

Everything is overwritten in place with zeros, so that no length and no offset table changes.
"""

from __future__ import annotations

import struct

from medfl.common.errors import CaseError

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_JPEG, _J2K = b"\xff\xd8", b"\xff\x4f\xff\x51"
# JPEG: SOS, EOI, and the markers without a length (ISO 10918-1 Table B.1).
_SOS, _EOI = 0xDA, 0xD9
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_COMMENT = 0xFE
# Adobe's marker says how colours are coded; SPIFF's says it in JPEG-LS.
_COLOURS = {0xEE: b"Adobe", 0xE8: b"mrfx"}
_J2K_COMMENT, _J2K_TILE = 0x64, 0x90


def clean_fragments(value: bytes) -> bytes:
    """Encapsulated pixel data (PS3.5 section A.4) without comments.

    Raises CaseError("dicom_pixels") where the items do not follow each other.
    """
    cleaned = bytearray(value)
    fragments = _fragments(value)
    start = 0
    while start < len(fragments):
        end = start + 1
        # One frame's stream may be cut into several fragments.
        while end < len(fragments) and not _begins(value, fragments[end]):
            end += 1
        places = fragments[start:end]
        stream = bytearray().join(value[a:b] for a, b in places)
        _clean_stream(stream)
        at = 0
        for a, b in places:
            cleaned[a:b] = stream[at : at + b - a]
            at += b - a
        start = end
    return bytes(cleaned)


def _fragments(value: bytes) -> list[tuple[int, int]]:
    """(start, end) of every fragment after the offset table."""
    places: list[tuple[int, int]] = []
    at = 0
    while at + 8 <= len(value) and value[at : at + 4] == _ITEM:
        (size,) = struct.unpack_from("<L", value, at + 4)
        if at + 8 + size > len(value):
            raise CaseError("dicom_truncated", "the file ends within a fragment")
        places.append((at + 8, at + 8 + size))
        at += 8 + size
    rest = value[at:]
    if not places or (rest and not rest.startswith(_END)) or len(rest) > 8:
        raise CaseError("dicom_pixels", "the fragments do not follow each other")
    (first, end), fragments = places[0], places[1:]
    offsets = struct.unpack(f"<{(end - first) // 4}L", value[first : end - (end - first) % 4])
    if (end - first) % 4 or any(o not in {a - 8 - end for a, _ in fragments} for o in offsets):
        raise CaseError("dicom_pixels", "the offset table points to no fragment")
    return fragments


def _begins(value: bytes, place: tuple[int, int]) -> bool:
    return value[place[0] : place[1]].startswith((_JPEG, _J2K))


def _clean_stream(stream: bytearray) -> None:
    if stream.startswith(_J2K):
        _clean_j2k(stream)
    elif stream.startswith(_JPEG):
        _clean_jpeg(stream)


def _clean_jpeg(stream: bytearray) -> None:
    """Comments and applications' segments, and what follows the end of the image."""
    at = 2
    while at + 4 <= len(stream):
        if stream[at] != 0xFF:
            raise CaseError("dicom_pixels", "a JPEG stream without its markers")
        marker = stream[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == _EOI:
            break
        if marker in _ALONE:
            at += 2
            continue
        (size,) = struct.unpack_from(">H", stream, at + 2)
        body, end = at + 4, at + 2 + size
        if size < 2 or end > len(stream):
            raise CaseError("dicom_truncated", "the JPEG stream ends within a segment")
        if _is_foreign(marker, stream[body:end]):
            stream[body:end] = bytes(end - body)
        at = _after_scan(stream, end) if marker == _SOS else end
    if stream[at : at + 2] == b"\xff\xd9":
        stream[at + 2 :] = bytes(len(stream) - at - 2)


def _is_foreign(marker: int, body: bytes | bytearray) -> bool:
    if marker == _COMMENT:
        return True
    if not 0xE0 <= marker <= 0xEF:
        return False
    known = _COLOURS.get(marker)
    return known is None or not body.startswith(known) or len(body) > 34


def _after_scan(stream: bytearray, at: int) -> int:
    """The next marker that is not part of the entropy-coded data.

    JPEG-LS stuffs a bit and not a byte: there, what follows 0xFF lies below 0x80.
    """
    while (at := stream.find(b"\xff", at)) >= 0 and at + 1 < len(stream):
        following = stream[at + 1]
        if following >= 0x80 and following != 0xFF and not 0xD0 <= following <= 0xD7:
            return at
        at += 1
    return len(stream)


def _clean_j2k(stream: bytearray) -> None:
    """Comments of the main header and of tile-parts, and what follows the end of the codestream."""
    at, tile_end = 2, len(stream)
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == _EOI:
            stream[at + 2 :] = bytes(len(stream) - at - 2)
            return
        if marker == 0x93:  # SOD: the tile-part's data go up to its end
            at = tile_end
            continue
        (size,) = struct.unpack_from(">H", stream, at + 2)
        end = at + 2 + size
        if size < 2 or end > len(stream):
            raise CaseError("dicom_truncated", "the JPEG 2000 stream ends within a segment")
        if marker == _J2K_TILE and size >= 10:
            (length,) = struct.unpack_from(">L", stream, at + 6)
            tile_end = at + length if length else len(stream)
            if tile_end < end or tile_end > len(stream):
                raise CaseError("dicom_pixels", "a tile of JPEG 2000 without its end")
        elif marker == _J2K_COMMENT:
            stream[at + 6 : end] = bytes(end - at - 6)
        at = end
