"""Tells by the first bytes of a file that it is not what its name says."""

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
    (b"PAR1", "parquet under another name; rename it to *.parquet"),
    (b"\x1f\x8b", "packed by gzip under another name; rename it to *.gz"),
    (b"BZh91AY&SY", "packed by bzip2 under another name; rename it to *.bz2"),
    (b"\xfd7zXZ\0", "packed by xz under another name; rename it to *.xz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it"),
)
# Encodings of seven bits would be read as ASCII. No text has the escapes of the first three. HZ's
# are plain characters: most of their runs must be of Chinese.
_ESCAPES = (
    ("ISO-2022-KR", re.compile(rb"\x1b\$\)C")),
    ("ISO-2022-CN", re.compile(rb"\x1b\$\)[AG]")),
    ("ISO-2022-JP", re.compile(rb"\x1b\$([@B]|\(D)")),
)
_HZ = re.compile(rb"~\{(?:[!-w][!-}])+~\}")
_CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")


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
    runs = [run.decode("hz", "replace") for run in _HZ.findall(start)]
    return "HZ" if len(runs) > 2 and all(map(_CHINESE.fullmatch, runs)) else ""
