"""Show every token as it is: spaces, line ends, parts of characters, and what has no shape."""

import unicodedata

VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
SIGNS = {*VISIBLE.values(), *"⟨⟩∅◌"}  # they have a meaning here, so a text's own are spelled out
NO_SHAPE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # Unicode's categories
ACCENTS = {"Mn", "Me", "Mc"}  # alone they would sit on whatever stands before them


def shown(raw: bytes) -> str:
    r"""Return a text that shows the bytes of a token; other bytes get another.

    b" cat\n" -> "␣cat↵"; b"\xf0\x9f" -> "⟨F0⟩⟨9F⟩"; b"\x00" -> "⟨U+0000⟩"; "␣" -> "⟨U+2423⟩".
    """
    if not raw:
        return "∅"
    text = raw.decode(errors="surrogateescape")  # a byte that is not UTF-8 -> U+DC00 + byte
    marked = "".join(map(_mark, text))
    return "◌" + marked if unicodedata.category(text[0]) in ACCENTS else marked


def _mark(character: str) -> str:
    code_point = ord(character)
    if character in VISIBLE:
        return VISIBLE[character]
    if 0xDC80 <= code_point <= 0xDCFF:
        return f"⟨{code_point - 0xDC00:02X}⟩"
    if character in SIGNS or unicodedata.category(character) in NO_SHAPE:
        return f"⟨U+{code_point:04X}⟩"
    return character
