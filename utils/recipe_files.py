# SPDX-License-Identifier: Apache-2.0
"""Recipe files: the words of a command line, read from a text file.

A line is read much as a shell reads it: white space parts words and quotes keep it; `#` at the beginning of a word
starts a comment; `~` at that of a path, and `$NAME`, stand for what they are in the shell, but in single quotes. Other
than there, a backslash is a letter, as in paths of Windows, unless a space, a quote, `$` or a comment follows, which
then mean themselves; in a word that begins as such a path does (C:\\, \\\\server) it is one always.
"""

import codecs
import os
import re
from pathlib import Path

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
WINDOWS_PATH = re.compile(r"(--[\w-]+=)?([A-Za-z]:\\|\\\\)")


def read_lines(path: str) -> list[str]:
    """The lines of a text file, in UTF-8 or, with its byte order mark, as some editors of Windows write it, UTF-16.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text; names the line.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return re.split(r"\r\n|\r|\n", content.decode(encoding))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {number}: not in UTF-8 ({error.reason})") from error


def split_line(line: str) -> list[str]:
    """The words of a line. One that begins with a quoted `@` begins with two in the list, as a value does that is no
    recipe.

    Raises:
        ValueError: a quote that nothing closes, or a variable that is not set.
    """
    words, at = [], 0
    while at < len(line):
        if line[at].isspace():
            at += 1
        elif line[at] == "#" or line[at:].rstrip() == "\\":  # a comment; the end of a line copied from a shell
            break
        else:
            word, at = _word(line, at)
            words.append(word)
    return words


def _word(line: str, at: int) -> tuple[str, int]:
    """The word that begins at a place, and the place behind it."""
    word, home, quote = "", None, ""  # home: where in the word a ~ is one's own
    doubled = "@" if line[at : at + 2] in ("'@", '"@') else ""
    while at < len(line) and (quote or not line[at].isspace()):
        letter, after = line[at], line[at + 1 : at + 2]
        is_variable = letter == "$" and quote != "'" and (variable := VARIABLE.match(line, at))
        if letter == quote or (letter in "'\"" and not quote):
            quote = "" if quote else letter
        elif is_variable and not variable[0][1:2].isdigit():
            name = variable[1] or variable[2]
            if name not in os.environ:
                raise ValueError(f"${name} is not set; a $ that means itself stands in single quotes")
            word += os.environ[name]
            at = variable.end() - 1
        elif letter == "\\" and _escapes(after, quote, word) and not WINDOWS_PATH.match(f"{word}\\"):
            word += after
            at += 1
        else:
            if letter == "~" and quote != "'" and re.fullmatch(r"(--[\w-]+=)?", word):
                home = len(word)
            word += letter
        at += 1
    if quote:
        raise ValueError(f"no closing quotation: {quote} is opened and not closed")
    if home is not None:
        word = word[:home] + os.path.expanduser(word[home:])
    return doubled + word, at


def _escapes(after: str, quote: str, word: str) -> bool:
    """Whether a backslash makes the letter `after` it mean itself; `word` is what stands before."""
    if quote:
        return quote == '"' and after in ('"', "$")
    return after in ("'", '"', "$") or after.isspace() or (after == "#" and not word)
