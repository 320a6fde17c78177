"""Which words this project does not use, because the field has another one: `python -m tests.words [PATH]...`.

Every line of code, help, error messages and documents is searched; the changelog and the data files are not. A line
that quotes other people's words (what a model answered, what a file is called by its inventors) ends with `# quote`,
or stands in `QUOTED`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
WORDS: Final = {
    "image": r"\bpictures?\b|\bphotos?\b(?!\.\w)|\blook(?:s|ed|ing)?\b",
    "preprocess, resize, tile, truncate": r"\bcut(?:s|ting)?\b|\bno whole\b",
    "conversation": r"\btalks?\b",
    "send, add_image, pending images": r"(?:\.|def )say\(|\.show\(|\bwaiting\b(?= (?:image|for the next))|\.waiting\b",
    "finish_reason": r"\bfinish\b(?![_ ]reason)",
    "completion_tokens": r"\banswer_tokens\b",
    "tool_calls": r"(?<!prompt)\.calls\b|\bcalls=|[\"']calls[\"']",
    "n_gpu_layers": r"(?<!n_)gpu_layers|(?<!n-)gpu-layers",
    "option, setting": r"\bwish(?:es|ed)?\b",
    "image budget": r"\bsight\b",
    "URL": r"\baddress(?:es)?\b",
    "character": r"\bsigns?\b",
    "integer": r"\bwhole numbers?\b",
    "NaN": r"\bno numbers?\b",
    "sampled, synthetic, rendered": r"\bdrawn\b",
    "statistics, values": r"\bfigures?\b",
    "disk cache": r"\bshel(?:f|ves)\b",
    "manifest, downloaded": r"\bpulled\b",
    "fingerprint": r"\bidentity\b",
    "hub cache": r"\bblobs?\b",
    "worker thread": r"\bbackground\b",
    "transformers": r"\bthe reference(?:'s)?\b",
    "baseline": r"\bpeers?\b",
    "is not a valid": r"(?<!there )\bis no (?!longer\b|more\b)|(?-i:\bis none\b)",
    "if": r"\bwhere (?:there (?:is|are|was|were)|none|nobody|nothing|possible|needed|wanted|asked)\b",
    "stored in": r"\b(?:lies|lie|lay|lying)\b",
    "honoured": r"\bheed(?:s|ed)?\b",
    "the start of": r"\bthe begin\b(?!-)",
}
"""What to write -> a regular expression of what not to write; any case counts."""
QUOTED: Final = (
    "white background",
    "plain background",
    "What does the sign say?",
    "sign says",
)
"""Words of the demonstration model and of the images that it was trained on."""
_SKIPPED: Final = (
    "CHANGELOG.md",
    "tests/words.py",
    "tests/test_words.py",
    "tests/data/",
    "tests/golden/",
    "tests/convert/data/",
)
_MEMORY: Final = "lfm2vl_edge/engine/"
"""Where addresses are those of memory."""
_PATTERNS: Final = {word: re.compile(pattern, re.IGNORECASE) for word, pattern in WORDS.items()}


def found(name: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, match and what to write instead, for each word of a file that is not to be used.

    Args:
        name: path of the file from the top of the project.
        text: its content.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.rstrip().endswith("# quote"):
            continue
        for quoted in QUOTED:
            line = line.replace(quoted, "")  # noqa: PLW2901
        for word, pattern in _PATTERNS.items():
            if word == "URL" and name.startswith(_MEMORY):
                continue
            for match in pattern.finditer(line):
                yield number, match[0], word


def files(given: list[str]) -> list[str]:
    """Return the paths of the tracked and new text files to search, or those of them below the given paths."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", *(given or [":/"])]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    kept = [name for name in listed if name.endswith((".py", ".md", ".toml", ".yml", ".html")) or name == "Makefile"]
    return sorted({name for name in kept if (ROOT / name).is_file() and not name.startswith(_SKIPPED)})


def main() -> None:
    """Print each word that is not to be used, and exit with 1 if there is one."""
    count = 0
    for name in files(sys.argv[1:]):
        for number, match, word in found(name, (ROOT / name).read_text(encoding="utf-8")):
            print(f"{name}:{number}: {match!r}: write {word}")
            count += 1
    print(f"{count} words to replace in {len(files(sys.argv[1:]))} files")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
