"""Control tokens in a text, told from text that spells them.

Text that spells a control token (`</s>`, `<|im_end|>`) is text, while the same letters written by a template are the token. So
that rendering cannot mix them up, they are two noncharacters of Unicode apart: in messages a control token's letters become a
mark before rendering and letters again afterwards (`PROTECTED`), and those left over, the template's, become another mark
(`CONTROL`), which `control_tokens` turns into ids.
"""

import re
from collections.abc import Sequence

from megatron_core_impl.data.records import MalformedRecord

CONTROL, PROTECTED = "\U0010fffe", "\U0010ffff"  # noncharacters, each followed by the number of a control token
FIRST_NUMBER = 0x100000  # as a character


class Marks:
    """Tells control tokens from text that spells them.

    Args:
        tokens: the control tokens; their order gives each its number.
        parse_special: let the letters of a control token in a message be the token, as Megatron-LLM does.
    """

    def __init__(self, tokens: Sequence[str], *, parse_special: bool = False) -> None:
        self.tokens = tokens
        self.parse_special = parse_special
        self._numbers = {token: number for number, token in enumerate(tokens)}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._protected, self._resolved = (
            re.compile(f"{mark}([{chr(FIRST_NUMBER)}-{chr(FIRST_NUMBER + 0xFFFD)}])") for mark in (PROTECTED, CONTROL)
        )

    def protect(self, text: str) -> str:
        """A message's text, in which no control token is spelled any more.

        Raises:
            MalformedRecord: it holds what is used as a mark.
        """
        if CONTROL in text or PROTECTED in text:
            raise MalformedRecord("a text holds U+10FFFE or U+10FFFF, which are no characters")
        if self.parse_special:
            return text
        return self._spelled.sub(lambda match: PROTECTED + chr(FIRST_NUMBER + self._numbers[match[0]]), text)

    def spell(self, resolved: str) -> str:
        """Text as `resolve` made it, its control tokens written out."""
        return self._resolved.sub(lambda match: self.tokens[ord(match[1]) - FIRST_NUMBER], resolved)

    def resolve(self, rendered: str) -> str:
        """Rendered text as the tokenizer takes it: control tokens as marks, the letters of messages as they were."""
        marked = self._spelled.sub(lambda match: CONTROL + chr(FIRST_NUMBER + self._numbers[match[0]]), rendered)
        return self._protected.sub(lambda match: self.tokens[ord(match[1]) - FIRST_NUMBER], marked)
