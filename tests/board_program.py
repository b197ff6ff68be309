"""What the tests of boards start there in place of edgehp: quick, and it says what it was given.

``board_program.py [version:X] [exit:N] [wait] [die] ...`` before the words that edgehp gets.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from edgehp import __version__


def main() -> int:
    words = sys.argv[1:]
    modes: dict[str, str] = {}
    while words and words[0].startswith("mode:"):
        name, _, value = words.pop(0).removeprefix("mode:").partition("=")
        modes[name] = value
    if words == ["--version"]:
        print(f"edgehp, version {modes.get('version', __version__)}")
        return 0
    print("edgehp: quantize: 1.2 s", file=sys.stderr)
    output = _after(words, "--output")
    for _ in range(int(modes.get("lines", 0))):
        print("x" * 1000)
    if "hang" in modes:
        try:
            mark = Path(os.environ["TMPDIR"], "hangs")
            mark.with_suffix(".new").write_text(str(os.getpid()))
            mark.with_suffix(".new").rename(mark)
            time.sleep(float(modes["hang"]))
        except KeyboardInterrupt:
            _write(output, "partial")
            return 130
    _write(output, "complete")
    files = {}
    for word in words:
        path = Path(word)
        if path.is_absolute() and path.exists():
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    name = os.fsencode(file.relative_to(path.parent)).decode("latin-1")
                    files[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    print(json.dumps({"words": words, "files": files, "folder": str(output)}))
    code = int(modes.get("exit", 0))
    if code:
        print("edgehp: error: found this, expected that", file=sys.stderr)
    return code


def _after(words: list[str], option: str) -> Path | None:
    return Path(words[words.index(option) + 1]) if option in words else None


def _write(folder: Path | None, state: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench-single-stream.json").write_text(json.dumps({"state": state}))


if __name__ == "__main__":
    sys.exit(main())
