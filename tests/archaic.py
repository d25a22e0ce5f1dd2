"""Archaic phrases, which texts of the program and pages of the documentation do without."""

from __future__ import annotations

ARCHAIC = {
    r"\banew\b": "again",
    r"\bnobody\b": "name who: no other user, no process",
    r"(?<![Tt]here )\bis no\b(?! longer| more)": "is not a …",
    r"(?<![Tt]here )\bare no\b(?! longer| more)": "are not …",
    r"(?<!\bone )\bof (?:its|their) own\b": "a separate …",
    r"\bstands? (?:in|beside|twice|nowhere|under|without|before)\b": "is, is written, occurs",
    r"\blies? (?:in|beside|beyond|as|on|under|otherwise)\b": "is, has the layout",
    r"\bgo(?:es|ne)? on (?:with|from|when)\b": "continue",
    r"\bwithout a word\b": "without an error, without a message",
    r"\bfor want of\b": "because … ran out",
    r"\bso it is in\b": "… has the same",
    r"\bmay not be asked\b": "offline mode is on",
    r"\bwhatever it\b": "name it",
    r"\bwhat engines ask\b": "what engines check",
    r"\bknows? no\b": "does not know, does not support",
    r"\ball the same\b": "anyway",
    r"\bleads? nowhere\b": "does not exist",
    r"\bbefore its time\b": "unexpectedly",
    r"\bof which no\b": "two sentences",
    r"\b(?:hence|thus|thereof|therein|whereof|wherein|lest|ere)\b": "so, of it, in which",
    r"\band 0 more\b": "`lora_merge.words` cuts lists",
}
"""Phrase → the plain words to use in its place."""
