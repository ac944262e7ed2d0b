"""Show every token as it is: spaces, line ends, parts of characters, and what has no shape."""

import unicodedata

VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
NO_SHAPE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # Unicode's categories
FIRST_STANDS_ALONE = {"Mn", "Me", "Mc"}  # accents, which would sit on what stands before them


def shown(raw: bytes) -> str:
    r"""b" cat\n" -> "␣cat↵"; b"\xf0\x9f" -> "⟨F0⟩⟨9F⟩"; b"\x00" -> "⟨U+0000⟩"."""
    if not raw:
        return "∅"
    text = raw.decode(errors="surrogateescape")  # a byte that is not UTF-8 -> U+DC80 + byte
    marked = "".join(map(_mark, text))
    return "◌" + marked if unicodedata.category(text[0]) in FIRST_STANDS_ALONE else marked


def _mark(character: str) -> str:
    if character in VISIBLE:
        return VISIBLE[character]
    code_point = ord(character)
    if 0xDC80 <= code_point <= 0xDCFF:
        return f"⟨{code_point - 0xDC00:02X}⟩"
    if unicodedata.category(character) in NO_SHAPE:
        return f"⟨U+{code_point:04X}⟩"
    return character
