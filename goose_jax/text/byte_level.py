"""The byte-level alphabet of GPT-2, in which files `tokenizer.json` spell bytes."""


def _alphabet() -> dict[str, int]:
    """Returns the byte that each character of the byte-level alphabet stands for.

    Printable characters of Latin-1 stand for their own byte. U+0100, U+0101, ... stand for the
    other bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_ALPHABET = _alphabet()


def from_byte_level(text: str) -> bytes | None:
    """Returns the bytes that a text spells, or None if it has a character of no byte."""
    if any(character not in _ALPHABET for character in text):
        return None
    return bytes(_ALPHABET[character] for character in text)


__all__ = ["from_byte_level"]
