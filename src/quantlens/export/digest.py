"""The digest that an exported file carries of its own content, so that a changed byte is refused and not computed with.

Of an .onnx it is that of protobuf's fields, of the model and of its graph, in any order: a tool that only writes the
file again keeps it. Of an .xml it is that of its text and of the .bin beside it. A .pt2 is a zip archive, which has
checksums of its own.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from quantlens.errors import BadWeightsError

KEY = "sha256"
"""Its name in a file's metadata."""

NOTHING = "0" * 64
"""What an .xml has in its place while it is computed."""

PRODUCER, GRAPH, METADATA = 2, 7, 14
"""Numbers of protobuf's fields in an ONNX model."""

ENTRY = b"\x0a\x06" + KEY.encode() + b"\x12\x40"
"""How protobuf begins the entry of the metadata: the key, and the length of the value."""

MAKER = b"quantlens"

HEAD, FIXED, CUT = 20, {1: 8, 5: 4}, "it is cut off, or no ONNX file"
"""Bytes in which a field's number and length are; sizes of values by their wire type; what is said of other bytes."""

CHUNK = 1 << 20

IN_XML = re.compile(rb'<%s value="([0-9a-f]{64})"' % KEY.encode())

DAMAGED = (
    f"the content does not match the digest; copy or export it again (a tool that changes it removes {KEY!r} from its "
    "metadata)"
)


class Field(NamedTuple):
    """A field of a protobuf message: its number, the places of its first byte, of its content and after its end."""

    number: int
    start: int
    content: int
    end: int


def seal(path: Path) -> None:
    """Write the digest into an .onnx, or into an .xml in the place of :data:`NOTHING`."""
    if path.suffix == ".onnx":
        with path.open("r+b") as stream:
            entry = ENTRY + _fields_digest(stream, list(_fields(stream, 0, path.stat().st_size))).encode()
            stream.seek(0, os.SEEK_END)  # protobuf reads what is appended as one more entry
            stream.write(bytes([METADATA << 3 | 2, len(entry)]) + entry)
    else:
        text = path.read_bytes()
        path.write_bytes(text.replace(NOTHING.encode(), _text_digest(path, text).encode()))


def check_content(path: Path) -> None:
    """Raises BadWeightsError for a file whose content is not that which its digest is of, and for an .xml without its
    .bin. A file without a digest (of another tool, of an earlier release) is not checked."""
    if matches(path) is False:
        if path.suffix == ".xml":
            raise BadWeightsError(
                f"{path} and {path.with_suffix('.bin').name} are no pair, or one is damaged: {DAMAGED}"
            )
        why = "a checksum in it does not match; copy or export it again" if path.suffix == ".pt2" else DAMAGED
        raise BadWeightsError(f"{path} is damaged: {why}")


def matches(path: Path) -> bool | None:
    """Whether a file's content is what its digest is of; None for a file without one, or of another tool. Raises
    BadWeightsError for an .xml without its .bin, and for an .onnx that is cut off."""
    if path.suffix == ".pt2":
        try:
            with zipfile.ZipFile(path) as parts:
                return parts.testzip() is None
        except (zipfile.BadZipFile, OSError, EOFError):
            return None  # what reads it says why
    if path.suffix == ".onnx":
        try:
            with path.open("rb") as stream:
                fields = list(_fields(stream, 0, path.stat().st_size))
                makers = [_read(stream, f.content, len(MAKER)) for f in fields if f.number == PRODUCER]
                said = next((f for f in fields if _is_digest(stream, f)), None)
                if said is None or MAKER not in makers:
                    return None  # another tool's may have kept the metadata
                own = _read(stream, said.content, said.end - said.content)[len(ENTRY) :]
                return own == _fields_digest(stream, fields).encode()
        except ValueError as error:
            raise BadWeightsError(f"{path} cannot be run by ONNX Runtime: {error}; copy or make it again") from None
    text = path.read_bytes()
    if b"<net" not in text[:4096]:
        raise BadWeightsError(f"{path} cannot be run: it is XML, and no model of OpenVINO")
    if not path.with_suffix(".bin").is_file():
        if b'type="Const"' not in text:
            return None
        raise BadWeightsError(f"{path} has its weights in the bin file {path.stem}.bin: put that beside it")
    written = IN_XML.search(text)
    if written is None or b"<nncf>" in text:
        return None
    return written[1].decode() == _text_digest(path, text)


def _text_digest(path: Path, text: bytes) -> str:
    digest = hashlib.sha256(re.sub(rb'(?<=<%s value=")[0-9a-f]{64}' % KEY.encode(), b"", text))
    with path.with_suffix(".bin").open("rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _is_digest(stream: BinaryIO, field: Field) -> bool:
    return field.number == METADATA and _read(stream, field.content, len(ENTRY)) == ENTRY


def _read(stream: BinaryIO, start: int, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size)


def _fields_digest(stream: BinaryIO, fields: list[Field]) -> str:
    parts = []
    for field in fields:
        if field.number == GRAPH:
            parts += [_hashed(stream, b"graph", one) for one in list(_fields(stream, field.content, field.end))]
        elif not _is_digest(stream, field):
            parts.append(_hashed(stream, b"model", field))
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def _hashed(stream: BinaryIO, where: bytes, field: Field) -> bytes:
    digest = hashlib.sha256(where)
    for start in range(field.start, field.end, CHUNK):
        digest.update(_read(stream, start, min(CHUNK, field.end - start)))
    return digest.digest()


def _fields(stream: BinaryIO, start: int, stop: int) -> Iterator[Field]:
    """The fields of a protobuf message. Raises ValueError for what is none, or is cut off."""

    def number(head: bytes, at: int) -> tuple[int, int]:
        """A number in base 128, and the place after it."""
        end = next((k for k in range(at, len(head)) if head[k] < 0x80), None)
        if end is None:
            raise ValueError(CUT)
        return sum((byte & 0x7F) << 7 * k for k, byte in enumerate(head[at : end + 1])), end + 1

    while start < stop:
        head = _read(stream, start, min(HEAD, stop - start))
        tag, at = number(head, 0)
        wire, size = tag & 7 if tag >> 3 else None, FIXED.get(tag & 7, 0)
        if wire in (0, 2):
            value, at = number(head, at)
            size = value if wire == 2 else 0
        elif wire not in FIXED:
            raise ValueError(CUT)
        if start + at + size > stop:
            raise ValueError(CUT)
        yield Field(tag >> 3, start, start + at, start + at + size)
        start += at + size
