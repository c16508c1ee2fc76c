"""What a file is by its first bytes, where its name says something else."""

import codecs
import re

_MARKS = (  # the first bytes of what is no UTF-8 text, though it may have letters only
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_FORMATS = (
    (b"%PDF-", "PDF; convert it to text"),
    (b"{\\rtf", "RTF; convert it to text"),
    (b"%!PS", "PostScript; convert it to text"),
    (b"PK\3\4", "a zip archive, as .docx and .epub are too; unpack it, or convert it to text"),
    (b"\x1f\x8b", "packed by gzip under another name; rename it to *.gz"),
    (b"BZh91AY&SY", "packed by bzip2 under another name; rename it to *.bz2"),
    (b"\xfd7zXZ\0", "packed by xz under another name; rename it to *.xz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it"),
)
# Encodings of seven bits read as ASCII. The escapes of the first three stand in no text, those of
# the others are plain characters: they have to be many, and the whole has to be right.
_ESCAPES = (
    ("ISO-2022-KR", re.compile(rb"\x1b\$\)C")),
    ("ISO-2022-CN", re.compile(rb"\x1b\$\)[AG]")),
    ("ISO-2022-JP", re.compile(rb"\x1b\$([@B]|\(D)")),
)
_RUNS = (
    ("HZ", re.compile(rb"~\{(?:[!-w][!-}])+~\}")),
    ("UTF-7", re.compile(rb"\+(?=[a-z0-9/]*[A-Z])[A-Za-z0-9+/]{3,}-?")),
)
_LEAST_SHARE = 0.03  # of the bytes


def describe_foreign(start: bytes) -> str:
    """Returns what a file is that begins so, and what to do; "" if it may be text in UTF-8."""
    if reason := next((reason for mark, reason in _FORMATS if start.startswith(mark)), ""):
        return reason
    name = next((name for mark, name in _MARKS if start.startswith(mark)), "")
    if name := name or _without_mark(start) or _of_seven_bits(start):
        with_iconv = f", for example with iconv -f {name} -t UTF-8" if name != "HZ" else ""
        return f"{name}; convert it to UTF-8{with_iconv}"
    return ""


def _without_mark(start: bytes) -> str:
    """Returns UTF-16's name if many of every other byte, and no others, are zero, as in English."""
    start = start[: min(8192, len(start)) // 2 * 2]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if min(even, odd) or 8 * max(even, odd) < max(16, len(start)):
        return ""
    name = "UTF-16LE" if odd else "UTF-16BE"
    text = codecs.getincrementaldecoder(name)("replace").decode(start)
    is_text = "\ufffd" not in text and "".join(text.split()).isprintable()
    return name if is_text else ""


def _of_seven_bits(start: bytes) -> str:
    if not start.isascii():
        return ""
    if found := next((name for name, escape in _ESCAPES if escape.search(start)), ""):
        return found
    for name, runs in _RUNS:
        if sum(map(len, runs.findall(start))) > _LEAST_SHARE * len(start):
            try:
                codecs.getincrementaldecoder(name)().decode(start)
            except UnicodeDecodeError:
                continue
            return name
    return ""
